"""What a long command tells of itself while it runs. The command line decides how it looks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Step:
    """One optimizer step, as just finished."""

    step: int
    total: int
    stage: int
    loss: float
    rate: float
    """Answer tokens, or pairs, per second."""
    unit: str
    """What `rate` counts."""
    phase: str = ""
    """What is trained for, where that changes."""
    of_phase: tuple[int, int] | None = None
    """The step within the phase, and the phase's steps; None where there is but one."""

    @property
    def place(self) -> tuple[int, int]:
        """(step, of how many), in the phase where there are several."""
        return self.of_phase or (self.step, self.total)


@dataclass(frozen=True)
class Validation:
    """What was measured on held-out data, after a step."""

    phase: str
    place: tuple[int, int]
    """(step, of how many), in the phase."""
    metrics: Mapping[str, float]
    """`{"val/loss": 0.25, ...}`"""
    best: tuple[str, int]
    """Phase, and step within it, of the best so far; it may be this one."""

    @property
    def is_best(self) -> bool:
        return self.best == (self.phase, self.place[0])


class Progress(Protocol):
    def start(self, title: str, total: int) -> None: ...

    def step(self, step: Step) -> None: ...

    def validated(self, validation: Validation) -> None: ...

    def stop(self) -> None: ...


class Silent:
    """For callers who want no progress."""

    def start(self, title: str, total: int) -> None:
        pass

    def step(self, step: Step) -> None:
        pass

    def validated(self, validation: Validation) -> None:
        pass

    def stop(self) -> None:
        pass
