"""A schedule that decreases linearly from the first step to the last."""

from pydantic import BaseModel, Field

from loragen.core.protocols import Rate


class LinearDecay:
    """Decreases from `learning_rate` at the first step to `final_share` of it at the last."""

    class Config(BaseModel, extra="forbid"):
        learning_rate: float = Field(1e-4, gt=0, description="Rate of the first step (per step).")
        final_share: float = Field(
            0.1, gt=0, le=1, description="Rate of the last step as a share of the first."
        )

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self, step: int, total_steps: int) -> Rate:
        progress = (step - 1) / max(1, total_steps - 1)  # 0 at the first step, 1 at the last
        share = 1 - (1 - self.config.final_share) * progress
        return Rate(self.config.learning_rate * share, stage=1)
