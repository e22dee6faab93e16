"""Which step of a training is kept: by validation data only, never by anything else. Light."""

from dataclasses import dataclass
from math import inf, isnan


@dataclass(frozen=True)
class Selection:
    """The rule, as the model file tells it."""

    metric: str | None
    """What is watched, `val_unseen/loss`; None where nothing is held out."""
    higher_is_better: bool = False
    sentence: str = "the last step (nothing was held out)"

    def better(self, value: float, best: float | None) -> bool:
        """Whether a validation beats the best so far. What is no number is the worst."""
        if best is None:
            return True
        worst = -inf if self.higher_is_better else inf
        new, old = (worst if isnan(one) else one for one in (value, best))
        return new > old if self.higher_is_better else new < old

    def label(self, value: float) -> str:
        """`val_loss=0.1234`, for a file's name."""
        return f"val_{str(self.metric).rpartition('/')[2]}={value:.4f}"


def select_by(seen: bool, unseen: bool, tried: bool) -> Selection:
    """The rule, given whether prompts of the training datasets, and whole datasets, are held out,
    and whether the base model is tried on held-out rows with the generated adapters.

    New datasets are what a generator is for: they decide where there are any. So does what an
    adapter does, over what it looks like; its loss, since accuracies are coarse on few rows.
    """
    if not (seen or unseen):
        return Selection(None)
    where, who = ("val_unseen", "datasets") if unseen else ("val", "prompts")
    if tried:
        told = f"lowest {where}/behaviour: the base's loss on held-out rows of held-out {who}"
        return Selection(f"{where}/behaviour", sentence=told)
    return Selection(
        f"{where}/loss", sentence=f"lowest {where}/loss, reconstructing held-out {who}"
    )
