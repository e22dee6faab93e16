"""What a generator is trained for, step by step.

Light.
"""

from dataclasses import dataclass
from typing import Literal

Objective = Literal["reconstruction", "behaviour", "transfer"]
"""The collected weights; what the base does with the generated ones; the same, each adapter being
written from the other datasets alone, as if its own had never been collected."""


@dataclass(frozen=True)
class Phase:
    objective: Objective
    steps: int


@dataclass(frozen=True)
class Phases:
    """The phases in their order. Every one has a schedule of its own, from its first step on."""

    phases: tuple[Phase, ...]

    @property
    def total(self) -> int:
        """Optimizer steps of all phases together."""
        return sum(phase.steps for phase in self.phases)

    def at(self, step: int) -> tuple[Phase, int]:
        """The phase of optimizer step `step`, counted from 1, and the step within it, likewise.

        Beyond the last step it is the last one."""
        for phase in self.phases:
            if step <= phase.steps:
                return phase, step
            step -= phase.steps
        return self.phases[-1], self.phases[-1].steps

    @property
    def reconstruction(self) -> bool:
        """Whether pairs are drawn for their weights."""
        return any(phase.objective == "reconstruction" for phase in self.phases)

    @property
    def behaviour(self) -> bool:
        """Whether the base model is needed."""
        return any(phase.objective != "reconstruction" for phase in self.phases)

    def __str__(self) -> str:
        return ", then ".join(f"{phase.steps} steps of {phase.objective}" for phase in self.phases)
