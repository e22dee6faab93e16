"""Events of a long command while it runs, for one dataset or many. The command line shows them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

OutcomeStatus = Literal["done", "skipped", "failed", "interrupted"]


@dataclass(frozen=True)
class Step:
    """One optimizer step that has just finished."""

    step: int
    """Counted from 1."""
    total: int
    stage: int
    loss: float
    rate: float
    """Units per second."""
    unit: str
    """The unit of `rate`: "answer tokens/s" or "pairs/s"."""
    phase: str = ""
    """The objective of the phase, where a training has several phases."""
    within_phase: tuple[int, int] | None = None
    """(step, steps) of the phase; None where there is but one."""
    name: str = ""
    """The dataset that is trained on, or "generator"."""

    @property
    def position(self) -> tuple[int, int]:
        """(step, steps), of the phase where there are several."""
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


class Progress(Protocol):
    """What shows the progress of a command. Every event names its dataset (or "generator").

    A single training sends `start`, `step` and `validated` any number of times, and `end`. A
    command of several datasets sends `begin` before them, the `outcome` of each, whether it was
    trained or not, and `stop` in the end; their trainings may overlap.
    """

    def command_started(self, names: Sequence[str]) -> None:
        """The datasets of the command, in their order."""

    def training_started(self, name: str, total: int) -> None:
        """A training of `total` steps starts."""

    def step(self, step: Step) -> None: ...

    def validated(self, validation: Validation) -> None: ...

    def training_ended(self, name: str) -> None:
        """The training has ended, in whatever way."""

    def outcome(self, name: str, status: OutcomeStatus, line: str) -> None:
        """The result for one of several datasets; `line` says it whole: `failed: no such file`."""

    def command_ended(self) -> None:
        """No event follows."""


class Silent:
    """Shows nothing; a base class for whatever shows only some events."""

    def command_started(self, names: Sequence[str]) -> None:
        pass

    def training_started(self, name: str, total: int) -> None:
        pass

    def step(self, step: Step) -> None:
        pass

    def validated(self, validation: Validation) -> None:
        pass

    def training_ended(self, name: str) -> None:
        pass

    def outcome(self, name: str, status: OutcomeStatus, line: str) -> None:
        pass

    def command_ended(self) -> None:
        pass
