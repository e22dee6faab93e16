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


def select_by(seen: bool, unseen: bool) -> Selection:
    """The rule, given whether prompts of the training datasets, and whole datasets, are held out.

    New datasets are what a generator is for: they decide where there are any.
    """
    if unseen:
        return Selection("val_unseen/loss", sentence="lowest val_unseen/loss")
    if seen:
        return Selection("val/loss", sentence="lowest val/loss")
    return Selection(None)
