"""One rate from the first step to the last."""

from pydantic import BaseModel, Field

from loragen.core.protocols import Rate


class Constant:
    """`learning_rate` at every step."""

    class Config(BaseModel, extra="forbid"):
        learning_rate: float = Field(1e-4, gt=0, description="The rate (per step).")

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self, step: int, total_steps: int) -> Rate:  # noqa: ARG002  # the protocol's
        return Rate(self.config.learning_rate, stage=1)
