"""What schedules share that warm up and then decay.

Linear warm-up, then half a cosine down to a floor.

Linear warm-up, then a straight line down to a floor.
"""

from abc import ABC, abstractmethod
from math import cos, pi

from pydantic import BaseModel, Field

from loragen.core.protocols import Rate


class Decay(ABC):
    """From 0 to `learning_rate` along a straight line, then down to `floor` of it."""

    class Config(BaseModel, extra="forbid"):
        learning_rate: float = Field(1e-4, gt=0, description="The highest rate (per step).")
        warmup_ratio: float = Field(0.03, ge=0, lt=1, description="Share of steps that warm up.")
        floor: float = Field(0.0, ge=0, le=1, description="Last rate as a share of the highest.")

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self, step: int, total_steps: int) -> Rate:
        peak, floor = self.config.learning_rate, self.config.floor
        warmup = round(self.config.warmup_ratio * total_steps)
        if step <= warmup:
            return Rate(peak * step / warmup, stage=1)
        # The last step still moves: the rate reaches the floor one step after it.
        progress = (step - warmup - 1) / max(1, total_steps - warmup)
        share = floor + (1 - floor) * self.remains(min(1.0, progress))
        return Rate(peak * share, stage=1)

    @abstractmethod
    def remains(self, progress: float) -> float:
        """Of the height above the floor: 1 at progress 0, 0 at progress 1."""


class Cosine(Decay):
    """From 0 to `learning_rate` over the warm-up, then along a cosine to `floor` of it
    (SGDR without restarts, arXiv 1608.03983, eq. 5)."""

    def remains(self, progress: float) -> float:
        return 0.5 * (1 + cos(pi * progress))


class Linear(Decay):
    """From 0 to `learning_rate` over the warm-up, then straight down to `floor` of it."""

    def remains(self, progress: float) -> float:
        return 1 - progress
