"""Which step of a training is kept: by validation data only, never by anything else. Light."""

from dataclasses import dataclass
from math import inf, isnan

WITHIN = 0.01
"""Nats of the base's loss on a few held-out rows: what is less is chance."""


@dataclass(frozen=True)
class Selection:
    """The rule, as the model file tells it."""

    metric: str | None
    """What is watched, `val_unseen/loss`; None where nothing is held out."""
    sentence: str = "the last step (nothing was held out)"
    tolerance: float = 0.0
    """By how much a later step may be worse than the lowest so far and still take its place."""

    def accepts(self, value: float, lowest: float | None) -> bool:
        """Whether a validated step takes the place of the one kept so far. What is no number is
        the worst."""
        if lowest is None:
            return True
        new, old = (inf if isnan(one) else one for one in (value, lowest))
        return new <= old + self.tolerance if self.tolerance else new < old

    def label(self, value: float) -> str:
        """`val_loss=0.1234`, for a file's name."""
        return f"val_{str(self.metric).rpartition('/')[2]}={value:.4f}"


def select_by(seen: bool, unseen: bool, tried: bool) -> Selection:
    """The rule, given whether prompts of the training datasets, and whole datasets, are held out,
    and whether the base model is tried on held-out rows with the generated adapters.

    New datasets are what a generator is for: they decide where there are any. So does what an
    adapter does, over what it looks like; its loss, since accuracies are coarse on few rows. Where
    that no longer changes, the later step is taken, which has had more of the training.
    """
    if not (seen or unseen):
        return Selection(None)
    where, who = ("val_unseen", "datasets") if unseen else ("val", "prompts")
    if tried:
        told = (
            f"the last validated step with {where}/behaviour, the base's loss on held-out rows of "
            f"held-out {who}, within {WITHIN} of the lowest before"
        )
        return Selection(f"{where}/behaviour", told, WITHIN)
    return Selection(f"{where}/loss", f"lowest {where}/loss, reconstructing held-out {who}")
