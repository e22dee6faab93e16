"""How the weights move: the number of steps and their rates, and the optimizer."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import nn

from loragen.core.config import GenTrainConfig
from loragen.core.config.schema import GenTraining
from loragen.core.plugins import create, find
from loragen.core.protocols import Rate, Schedule


@dataclass(frozen=True)
class StepPlan:
    """The optimizer steps of a whole training, whatever of it is done already."""

    total: int
    schedule: Schedule
    per_epoch: int
    """Steps in which every checkpoint comes once."""

    def rate(self, step: int) -> Rate:
        """Of optimizer step `step`, counted from 1. (LambdaLR also asks for the one after the
        last.)"""
        return self.schedule(min(step, self.total), self.total)

    def epochs(self, step: int) -> float:
        """How often every checkpoint has been seen after `step` steps."""
        return step / self.per_epoch


def step_plan(config: GenTrainConfig, per_epoch: int) -> StepPlan:
    """As `training` and `trainer.limit_train_batches` end them."""
    total = config.training.max_epochs * per_epoch
    total = min(total, config.training.max_steps or total)
    limit, parts = config.trainer.limit_train_batches, config.trainer.accumulate_grad_batches
    if isinstance(limit, float):
        total = ceil(total * min(limit, 1.0))
    elif limit:
        total = min(total, ceil(limit / parts))
    return StepPlan(total, _schedule(config), per_epoch)


def _schedule(config: GenTrainConfig) -> Schedule:
    """`training.learning_rate` is meant for any schedule with a `learning_rate` left at default."""
    options = config.schedule.options
    default = find("schedule", config.schedule.name).Config.model_fields.get("learning_rate")
    if default is not None and options.get("learning_rate") == default.default:
        options = {**options, "learning_rate": config.training.learning_rate}
    schedule: Schedule = create("schedule", config.schedule.name, options)
    return schedule


def optimizer_for(network: nn.Module, options: GenTraining) -> torch.optim.Optimizer:
    """At a rate of 1, which `step_schedule` multiplies."""
    return torch.optim.AdamW(
        decayed_and_not(network.parameters()), lr=1.0, weight_decay=options.weight_decay
    )


def decayed_and_not(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Vectors (biases, norms) are not decayed, matrices are."""
    trained = [p for p in parameters if p.requires_grad]
    vectors = {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}
    return [{"params": [p for p in trained if p.ndim >= 2]}, vectors]
