"""The schedule under which the checkpoints of an adapter are collected."""

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
