"""How the weights move: the number of steps and their rates, and the optimizer."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from loragen.core.config import GenTrainConfig
from loragen.core.config.gen_schema import GenTraining
from loragen.core.generator.training.phases import Objective, Phase, Phases
from loragen.core.plugins import create, find
from loragen.core.protocols import Rate, Schedule


@dataclass(frozen=True)
class StepPlan:
    """The optimizer steps of a whole training, whatever of it is done already."""

    phases: Phases
    schedules: Mapping[Objective, Schedule]
    """Each phase has its own, from its first step to its last."""
    per_epoch: int
    """Steps of reconstruction in which every checkpoint comes once."""

    @property
    def transfers(self) -> bool:
        return any(phase.objective == "transfer" for phase in self.phases.phases)

    @property
    def total(self) -> int:
        return self.phases.total

    def rate(self, step: int) -> Rate:
        """Of optimizer step `step`, counted from 1. (LambdaLR also asks for the one after the
        last.)"""
        phase, within = self.phases.at(step)
        return self.schedules[phase.objective](within, phase.steps)

    def epochs(self, step: int) -> float:
        """How often every checkpoint would have been seen after `step` steps."""
        return step / self.per_epoch


def step_plan(config: GenTrainConfig, per_epoch: int) -> StepPlan:
    """As `training`, `behaviour` and `trainer.limit_train_batches` end the phases."""
    objective = config.training.objective
    steps = config.training.max_epochs * per_epoch
    reconstruction = Phase("reconstruction", min(steps, config.training.max_steps or steps))
    behaviour = Phase("behaviour", config.behaviour.max_steps)
    transfer = Phase("transfer", config.behaviour.max_steps)
    wanted = {
        "reconstruction": (reconstruction,),
        "behaviour": (behaviour,),
        "transfer": (transfer,),
        "reconstruction-then-behaviour": (reconstruction, behaviour),
    }[objective]
    phases = tuple(Phase(one.objective, _limited(config, one.steps)) for one in wanted)
    schedules: dict[Objective, Schedule] = {
        "reconstruction": _schedule(config, config.training.learning_rate),
        "behaviour": _schedule(config, config.behaviour.rate),
        "transfer": _schedule(config, config.behaviour.transfer_rate),
    }
    return StepPlan(Phases(phases), schedules, per_epoch)


def _limited(config: GenTrainConfig, steps: int) -> int:
    limit = config.trainer.limit_train_batches
    if isinstance(limit, float):
        return ceil(steps * min(limit, 1.0))
    return min(steps, ceil(limit / config.trainer.accumulate_grad_batches)) if limit else steps


def _schedule(config: GenTrainConfig, learning_rate: float) -> Schedule:
    """`learning_rate` is meant for any schedule with a `learning_rate` left at its default."""
    options = config.schedule.options
    known = find("schedule", config.schedule.name).Config.model_fields.get("learning_rate")
    if known is not None and options.get("learning_rate", known.default) == known.default:
        options = {**options, "learning_rate": learning_rate}
    schedule: Schedule = create("schedule", config.schedule.name, options)
    return schedule


def optimizer_for(
    trained: nn.ModuleDict, options: GenTraining, fused: bool = True
) -> torch.optim.Optimizer:
    """Of the network and, where it trains, the encoder; `step_schedule` multiplies the rates.

    `fused`: one pass over weights, gradient and moments in place of some ten.
    """
    groups = _groups(trained["network"], 1.0)
    if "encoder" in trained:
        groups += _groups(trained["encoder"], options.encoder_rate)
    decay = options.weight_decay
    match options.optimizer:
        case "adamw":
            return torch.optim.AdamW(groups, lr=1.0, weight_decay=decay, fused=fused)
        case "adam":
            return torch.optim.Adam(groups, lr=1.0, weight_decay=decay, fused=fused)
        case "sgd":
            momentum = options.momentum
            return torch.optim.SGD(
                groups, lr=1.0, weight_decay=decay, momentum=momentum, fused=fused
            )


def _groups(module: nn.Module, factor: float) -> list[dict[str, Any]]:
    """Vectors (biases, norms) are not decayed, matrices are."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "factor": factor},
        {"params": [p for p in trained if p.ndim < 2], "factor": factor, "weight_decay": 0.0},
    ]


def averaged(trained: nn.ModuleDict, decay: float | None) -> AveragedModel | None:
    """A copy that follows the weights as their exponential moving average, and starts as they
    are after the first step; None where none is wanted."""
    if decay is None:
        return None
    copy = AveragedModel(trained, multi_avg_fn=get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]  # torch's
    return copy.requires_grad_(False)
