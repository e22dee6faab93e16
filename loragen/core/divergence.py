"""A training that has diverged stops at once, with one line that says what to try."""

from collections.abc import Mapping
from math import isfinite
from pathlib import Path

from torch import Tensor

from loragen.core.errors import LoragenError


def check_loss(name: str, value: float, step: int, run: Path) -> None:
    """Raises LoragenError where a loss is no finite number."""
    if not isfinite(value):
        raise _diverged(f"{name} is {value}", step, run)


def check_weights(weights: Mapping[str, Tensor], step: int, run: Path) -> None:
    """Before they are saved: a bad checkpoint never takes the place of a good one.

    Raises LoragenError naming the first weight that is not finite.
    """
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise _diverged(f"{name} is not finite", step, run)


def _diverged(what: str, step: int, run: Path) -> LoragenError:
    return LoragenError(
        f"{run}: the training has diverged: {what} at step {step}; try a lower learning rate or "
        "trainer.gradient_clip_val=1.0 (what was saved before it is kept)"
    )
