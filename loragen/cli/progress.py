"""Progress on stderr: bars on a terminal, lines elsewhere."""

import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from loragen.cli import render
from loragen.core.errors import shortened
from loragen.core.progress import (
    OutcomeStatus,
    Progress,
    Silent,
    Step,
    Validation,
    is_first_process,
)

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

SECONDS_BETWEEN_LINES = 10.0
"""The least time between lines of one kind."""
SHOWN_METRICS = ("loss", "behaviour", "accuracy")
"""Metrics of a validation that are printed; the loggers have the others."""


def terminal_progress() -> Progress:
    """Returns a progress display on stderr; only the first process of a launcher shows any."""
    if not is_first_process():
        return Silent()
    return TerminalProgress() if sys.stderr.isatty() else PlainProgress()


class PlainProgress(Silent):
    """Prints the first step of a training (or phase), its last, and one every ten seconds.

    Prints validations too, unless they come faster than that and are not the best so far. If there
    are several datasets, each has a line with its outcome.
    """

    def __init__(self) -> None:
        self._numbers: dict[str, str] = {}
        self._begun: dict[str, tuple[str, float, int]] = {}
        """{name of a training: (its phase, the time and the step of its first event)}"""
        self._due: dict[tuple[str, type], float] = {}
        """{(name, kind of event): the time of the next line}"""

    def command_started(self, names: Sequence[str]) -> None:
        self._numbers = _numbers(names)

    def training_started(self, name: str, total: int) -> None:  # noqa: ARG002  # every step has the total
        self._begun.pop(name, None)
        self._due = {key: time for key, time in self._due.items() if key[0] != name}

    def step(self, step: Step) -> None:
        now, (at, total) = time.monotonic(), step.position
        if self._begun.get(step.name, (None,))[0] != step.phase:  # phases differ in speed
            self._begun[step.name] = step.phase, now, at
            self._due.pop((step.name, Step), None)
        if not self._is_due(step, now):
            return
        _, since, first = self._begun[step.name]
        left = ""
        if first < at < total:  # a resumed run has not seen the steps before `first`
            left = f", {(now - since) / (at - first) * (total - at):.0f} s left"
        render.note(f"{step.name}: {figures(step)}{left}")

    def validated(self, validation: Validation) -> None:
        if self._is_due(validation, time.monotonic()) or validation.is_best:
            render.note(f"{validation.name}: {measured(validation)}")

    def outcome(self, name: str, status: OutcomeStatus, line: str) -> None:
        if self._numbers or status == "skipped":
            render.note(f"{self._numbers.get(name, '')}{name}: {line}")

    def _is_due(self, event: Step | Validation, now: float) -> bool:
        key, (at, total) = (event.name, type(event)), event.position
        if now < self._due.get(key, 0.0) and at < total:
            return False
        self._due[key] = now + SECONDS_BETWEEN_LINES
        return True


class TerminalProgress(Silent):
    """Shows a bar per running training, with validations above it.

    If there are several datasets, another bar counts them, and each has a line with its outcome.
    """

    def __init__(self) -> None:
        self._numbers: dict[str, str] = {}
        self._bars: Bars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._count: TaskID | None = None
        self._outcomes = 0

    def command_started(self, names: Sequence[str]) -> None:
        self._numbers = _numbers(names)
        if self._numbers:
            self._count = self._add("datasets", len(names))

    def training_started(self, name: str, total: int) -> None:
        self._tasks[name] = self._add(name, total)

    def step(self, step: Step) -> None:
        if self._bars and step.name in self._tasks:
            at, total = step.position
            task = self._tasks[step.name]
            self._bars.update(task, completed=at, total=total, figures=figures(step))

    def validated(self, validation: Validation) -> None:
        self._print(f"{validation.name}: {measured(validation)}")

    def training_ended(self, name: str) -> None:
        task = self._tasks.pop(name, None)
        if self._numbers and self._bars and task is not None:
            self._bars.remove_task(task)
        elif not self._numbers and not self._tasks:  # a single training's bar stays on the screen
            self.command_ended()

    def outcome(self, name: str, status: OutcomeStatus, line: str) -> None:
        self.training_ended(name)
        if self._numbers or status == "skipped":
            self._print(f"{self._numbers.get(name, '')}{name}: {line}")
        if self._bars and self._count is not None:
            self._outcomes += 1
            shown = f"{self._outcomes} of {len(self._numbers)}"
            self._bars.update(self._count, completed=self._outcomes, figures=shown)

    def command_ended(self) -> None:
        if self._bars:
            self._bars.stop()
        self._bars, self._count = None, None
        self._tasks.clear()

    def _add(self, name: str, total: int) -> "TaskID":
        if self._bars is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bars = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bars.start()
        from rich.markup import escape

        return self._bars.add_task(escape(shortened(name, 32)), total=total, figures="")

    def _print(self, line: str) -> None:
        if self._bars:
            self._bars.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            render.note(line)


def figures(step: Step) -> str:
    """Returns `stage 2, step 80/125, loss 0.1250, 123 answer tokens/s`."""
    at, total = step.position
    rate = f"{step.rate:.0f}" if step.rate >= 10 else f"{step.rate:.2g}"
    return (
        f"{step.phase or f'stage {step.stage}'}, step {at}/{total}, "
        f"loss {step.loss:.4f}, {rate} {step.unit}"
    )


def measured(validation: Validation) -> str:
    """Returns `validated after reconstruction, step 8/40: val/loss 0.1250; the best so far`."""
    at, total = validation.position
    shown = {
        name: value
        for name, value in validation.metrics.items()
        if name.rpartition("/")[2] in SHOWN_METRICS
    }  # of an objective of another package, all
    metrics = ", ".join(
        f"{name} {value:.4f}" for name, value in (shown or validation.metrics).items()
    )
    phase, step = validation.best
    best = "the best so far" if validation.is_best else f"best so far: {phase}, step {step}"
    return f"validated after {validation.phase}, step {at}/{total}: {metrics}; {best}"


def _numbers(names: Sequence[str]) -> dict[str, str]:
    """Returns `{"arc": "[1/2] ", "boolq": "[2/2] "}`; empty for a single dataset."""
    several = names if len(names) > 1 else ()
    return {name: f"[{i}/{len(several)}] " for i, name in enumerate(several, start=1)}


def checkpoint_progress() -> Callable[[str, int, int], None]:
    """Returns what prints a line every ten seconds about a series whose checkpoints are read."""
    last = time.monotonic()

    def report(name: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() >= last + SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            render.note(f"{name}: {done}/{total} checkpoints")

    return report
