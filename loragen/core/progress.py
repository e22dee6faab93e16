"""Events of a command while it trains on one dataset or many. The command line shows them."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

OutcomeStatus = Literal["done", "skipped", "failed", "interrupted"]


def is_first_process() -> bool:
    """Returns whether this is process 0 of those that torchrun, Slurm or Lightning have started:
    the one that writes and prints."""
    variables = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
    return all(os.environ.get(variable, "0") == "0" for variable in variables)


@dataclass(frozen=True)
class Step:
    """One optimizer step that has just finished."""

    step: int
    """The number of the step, counted from 1."""
    total: int
    stage: int
    loss: float
    rate: float
    """Units per second."""
    unit: str
    """The unit of `rate`: "answer tokens/s" or "pairs/s"."""
    phase: str = ""
    """The name of the objective trained in this phase; empty if there is only one phase. (`stage`
    is the stage of the learning-rate schedule.)"""
    within_phase: tuple[int, int] | None = None
    """(step, steps) of the phase; None if there is only one."""
    name: str = ""
    """The dataset that is trained on, or "generator"."""

    @property
    def position(self) -> tuple[int, int]:
        """(step, steps) of the phase if there are several, else of the training."""
        return self.within_phase or (self.step, self.total)


@dataclass(frozen=True)
class Validation:
    """The metrics of held-out data after a step."""

    phase: str
    position: tuple[int, int]
    """(step, steps), of the phase."""
    metrics: Mapping[str, float]
    """`{"val/loss": 0.25, ...}`"""
    best: tuple[str, int]
    """(phase, step within it) of the best so far, which may be this one."""
    name: str = ""
    """The dataset that is trained on, or "generator"."""

    @property
    def is_best(self) -> bool:
        return self.best == (self.phase, self.position[0])


class Progress:
    """Shows the progress of a command. Every event names its dataset (or "generator").

    There are two levels. A training sends `training_started`, then `step` and `validated` any
    number of times, and `training_ended`. A command of several datasets also sends
    `command_started` before all trainings, the `outcome` of each dataset, whether it was trained or
    not, and `command_ended`; its trainings may overlap.
    """

    def command_started(self, names: Sequence[str]) -> None:
        """A command of several datasets starts; `names` are in their order."""

    def training_started(self, name: str, total: int) -> None:
        """A training of `total` steps starts."""

    def step(self, step: Step) -> None:
        """An optimizer step has finished."""

    def validated(self, validation: Validation) -> None:
        """A validation has finished."""

    def training_ended(self, name: str) -> None:
        """The training has ended, successfully or not."""

    def outcome(self, name: str, status: OutcomeStatus, line: str) -> None:
        """The outcome of one of several datasets. `line` is the complete message, for example
        `failed: no such file`."""

    def command_ended(self) -> None:
        """The command has ended; no event follows."""


class Silent(Progress):
    """Shows nothing. It is also the base class of classes that show only some events."""
