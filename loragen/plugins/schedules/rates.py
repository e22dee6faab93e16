"""The schedules: functions of the step, counted from 1, that may warm up.

A warm-up of w steps rises linearly, step k to k/w of the rate, so that step 1 trains. All steps
after it have the rates of transformers' schedule of the same name (`transformers.optimization`),
whose warm-up spends step 1 at rate 0.
"""

from abc import ABC, abstractmethod
from math import cos, pi, sqrt
from typing import Literal

from pydantic import BaseModel, Field, model_validator

from loragen.core.protocols import Rate

WARMUP = "Share of steps that warm up."


class TwoStage:
    """`learning_rate_stage1` for the first `stage1_steps` steps, then `learning_rate_stage2`.

    Stage 2 changes the weights little, so that its checkpoints are samples around one solution
    (Drag-and-Drop LLMs, arXiv 2506.16406, section on checkpoint collection).
    """

    class Config(BaseModel, extra="forbid"):
        stage1_steps: int = Field(75, ge=0, description="Steps of stage 1 (optimizer steps).")
        learning_rate_stage1: float = Field(1e-4, gt=0, description="Rate of stage 1 (per step).")
        learning_rate_stage2: float = Field(1e-5, gt=0, description="Rate of stage 2 (per step).")
        warmup_ratio: float = Field(0.0, ge=0, lt=1, description=WARMUP)

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self, step: int, total_steps: int) -> Rate:
        warmup = round(self.config.warmup_ratio * total_steps)
        if step <= self.config.stage1_steps:
            rate = Rate(self.config.learning_rate_stage1, stage=1)
        else:
            rate = Rate(self.config.learning_rate_stage2, stage=2)
        if step < warmup:
            rate = rate._replace(learning_rate=rate.learning_rate * step / warmup)
        return rate


class Constant:
    """`learning_rate` at every step, after a warm-up if there is one."""

    class Config(BaseModel, extra="forbid"):
        learning_rate: float = Field(1e-4, gt=0, description="The rate (per step).")
        warmup_ratio: float = Field(0.0, ge=0, lt=1, description=WARMUP)

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self, step: int, total_steps: int) -> Rate:
        warmup = round(self.config.warmup_ratio * total_steps)
        peak = self.config.learning_rate
        return Rate(peak * step / warmup if step < warmup else peak, stage=1)


class Decay(ABC):
    """Rises linearly from 0 to `learning_rate`, then decays to `floor` times that."""

    class Config(BaseModel, extra="forbid"):
        learning_rate: float = Field(1e-4, gt=0, description="The highest rate (per step).")
        warmup_ratio: float = Field(0.03, ge=0, lt=1, description=WARMUP)
        floor: float = Field(0.0, ge=0, le=1, description="Last rate as a share of the highest.")

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self, step: int, total_steps: int) -> Rate:
        peak, floor = self.config.learning_rate, self.config.floor
        warmup = round(self.config.warmup_ratio * total_steps)
        if step <= warmup:
            return Rate(peak * step / warmup, stage=1)
        start = total_steps - self.decay_steps(total_steps, warmup)
        # The floor is reached one step after the last, so that the last step still trains.
        progress = max(0, step - start - 1) / max(1, total_steps - start)
        share = floor + (1 - floor) * self.remaining(min(1.0, progress))
        return Rate(peak * share, stage=2 if step > start > warmup else 1)

    def decay_steps(self, total_steps: int, warmup: int) -> int:
        """Returns how many of the last steps decay: all after the warm-up."""
        return total_steps - warmup

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


class Polynomial(Decay):
    """Rises linearly to `learning_rate`, then falls with a power of what remains: ``(1 - t)^power``
    for t from 0 to 1. Power 1 is `linear`."""

    class Config(Decay.Config):
        power: float = Field(1.0, gt=0, le=10, description="Exponent of the decay.")

    config: Config

    def remaining(self, progress: float) -> float:
        return (1 - progress) ** self.config.power


class WarmupStableDecay(Decay):
    """Rises linearly to `learning_rate`, stays there (stage 1), and decays at the end (stage 2).

    A run may be prolonged from before its decay, whose length is chosen last (MiniCPM, arXiv
    2404.06395, section 4; the shape 1-sqrt is that of arXiv 2405.18392).
    """

    class Config(Decay.Config):
        decay_ratio: float = Field(0.2, ge=0, le=1, description="Share of steps that decay.")
        decay: Literal["cosine", "linear", "1-sqrt"] = Field(
            "cosine", description="Shape of the decay."
        )

        @model_validator(mode="after")
        def _both_fit(self) -> "WarmupStableDecay.Config":
            if self.warmup_ratio + self.decay_ratio > 1:
                raise ValueError("warmup_ratio and decay_ratio together are more than 1")
            return self

    config: Config

    def decay_steps(self, total_steps: int, warmup: int) -> int:
        return min(round(self.config.decay_ratio * total_steps), total_steps - warmup)

    def remaining(self, progress: float) -> float:
        if self.config.decay == "cosine":
            return 0.5 * (1 + cos(pi * progress))
        return 1 - progress if self.config.decay == "linear" else 1 - sqrt(progress)
