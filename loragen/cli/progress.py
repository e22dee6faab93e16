"""Progress on stderr: a Rich bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from typing import TYPE_CHECKING

from loragen.cli import render
from loragen.core.progress import Progress, Step, Validation

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

SECONDS_BETWEEN_LINES = 10.0
MEASURES = ("loss", "behaviour", "accuracy")
"""Of a validation; the loggers have the others."""


def terminal_progress() -> Progress:
    return RichProgress() if sys.stderr.isatty() else PlainProgress()


class PlainProgress:
    """The first step, then one line every ten seconds, then the last; and validations, unless they
    come faster and bring nothing new."""

    def start(self, title: str, total: int) -> None:  # noqa: ARG002  # a bar wants it
        self._title = title
        self._first: tuple[float, int] | None = None
        self._next, self._phase = 0.0, ""
        self._next_validation = 0.0

    def step(self, step: Step) -> None:
        now = time.monotonic()
        if step.phase != self._phase:  # its steps take another time
            self._first, self._next, self._phase = None, 0.0, step.phase
        at, total = step.place
        if now < self._next and at < total:
            return
        self._next = now + SECONDS_BETWEEN_LINES
        render.note(f"{self._title}: {figures(step)}{self._left(now, step)}")

    def validated(self, validation: Validation) -> None:
        now, (at, total) = time.monotonic(), validation.place
        if now < self._next_validation and at < total and not validation.is_best:
            return
        self._next_validation = now + SECONDS_BETWEEN_LINES
        render.note(f"{self._title}: {measured(validation)}")

    def _left(self, now: float, step: Step) -> str:
        """Of the phase, measured from its first step seen: of a run that goes on, others had the
        ones before."""
        at, total = step.place
        if self._first is None:
            self._first = now, at
        then, first = self._first
        if at in (first, total):
            return ""
        return f", {(now - then) / (at - first) * (total - at):.0f} s left"

    def stop(self) -> None:
        pass


class RichProgress:
    """One bar per run: stage, step/total, loss, rate, time left; validations above it."""

    _bar: "Bar | None" = None
    _task: "TaskID"

    def start(self, title: str, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._title = title
        self._bar.start()
        self._task = self._bar.add_task(title, total=total, figures="")

    def step(self, step: Step) -> None:
        if self._bar:
            at, total = step.place
            self._bar.update(self._task, completed=at, total=total, figures=figures(step))

    def validated(self, validation: Validation) -> None:
        if self._bar:
            line = f"{self._title}: {measured(validation)}"
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        if self._bar:
            self._bar.stop()
        self._bar = None


def figures(step: Step) -> str:
    at, total = step.place
    rate = f"{step.rate:.0f}" if step.rate >= 10 else f"{step.rate:.2g}"
    return (
        f"{step.phase or f'stage {step.stage}'}, step {at}/{total}, "
        f"loss {step.loss:.4f}, {rate} {step.unit}"
    )


def measured(validation: Validation) -> str:
    """`validated after reconstruction, step 8/40: val/loss 0.1250; the best so far`"""
    at, total = validation.place
    told = ", ".join(
        f"{name} {value:.4f}"
        for name, value in validation.metrics.items()
        if name.rpartition("/")[2] in MEASURES
    )
    phase, step = validation.best
    best = "the best so far" if validation.is_best else f"best so far: {phase}, step {step}"
    return f"validated after {validation.phase}, step {at}/{total}: {told}; {best}"
