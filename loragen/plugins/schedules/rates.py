"""The schedules: two stages, constant, and linear warm-up followed by cosine or linear decay."""

from abc import ABC, abstractmethod
from math import cos, pi

from pydantic import BaseModel, Field

from loragen.core.protocols import Rate


class TwoStage:
    """`learning_rate_stage1` for the first `stage1_steps` steps, then `learning_rate_stage2`.

    Stage 2 changes the weights little, so that its checkpoints are samples around one solution
    (Drag-and-Drop LLMs, arXiv 2506.16406, section on checkpoint collection).
    """

    class Config(BaseModel, extra="forbid"):
        stage1_steps: int = Field(75, ge=0, description="Steps of stage 1 (optimizer steps).")
        learning_rate_stage1: float = Field(1e-4, gt=0, description="Rate of stage 1 (per step).")
        learning_rate_stage2: float = Field(1e-5, gt=0, description="Rate of stage 2 (per step).")

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self, step: int, total_steps: int) -> Rate:  # noqa: ARG002  # the signature of Schedule
        if step <= self.config.stage1_steps:
            return Rate(self.config.learning_rate_stage1, stage=1)
        return Rate(self.config.learning_rate_stage2, stage=2)


class Constant:
    """`learning_rate` at every step."""

    class Config(BaseModel, extra="forbid"):
        learning_rate: float = Field(1e-4, gt=0, description="The rate (per step).")

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self, step: int, total_steps: int) -> Rate:  # noqa: ARG002  # the signature of Schedule
        return Rate(self.config.learning_rate, stage=1)


class Decay(ABC):
    """Rises linearly from 0 to `learning_rate`, then decays to `floor` times that."""

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
        # The floor is reached one step after the last, so that the last step still trains.
        progress = (step - warmup - 1) / max(1, total_steps - warmup)
        share = floor + (1 - floor) * self.remaining(min(1.0, progress))
        return Rate(peak * share, stage=1)

    @abstractmethod
    def remaining(self, progress: float) -> float:
        """Returns the share of the decay that remains: 1 at progress 0, 0 at progress 1."""


class Cosine(Decay):
    """Rises linearly to `learning_rate`, then follows half a cosine down to `floor` times that
    (SGDR without restarts, arXiv 1608.03983, eq. 5)."""

    def remaining(self, progress: float) -> float:
        return 0.5 * (1 + cos(pi * progress))


class Linear(Decay):
    """Rises linearly to `learning_rate`, then falls linearly to `floor` times that."""

    def remaining(self, progress: float) -> float:
        return 1 - progress
