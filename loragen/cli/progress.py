"""Progress on stderr: a Rich bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from typing import TYPE_CHECKING

from loragen.cli import render
from loragen.core.progress import Progress, Step

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

SECONDS_BETWEEN_LINES = 10.0


def terminal_progress() -> Progress:
    return RichProgress() if sys.stderr.isatty() else PlainProgress()


class PlainProgress:
    """The first step, then one line every ten seconds, then the last."""

    def start(self, title: str, total: int) -> None:  # noqa: ARG002  # a bar wants it
        self._title = title
        self._first: tuple[float, int] | None = None
        self._next, self._phase = 0.0, ""

    def step(self, step: Step) -> None:
        now = time.monotonic()
        if step.phase != self._phase:  # its steps take another time
            self._first, self._next, self._phase = None, 0.0, step.phase
        at, total = step.place
        if now < self._next and at < total:
            return
        self._next = now + SECONDS_BETWEEN_LINES
        render.note(f"{self._title}: {figures(step)}{self._left(now, step)}")

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
    """One bar per run: stage, step/total, loss, rate, time left."""

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
        self._bar.start()
        self._task = self._bar.add_task(title, total=total, figures="")

    def step(self, step: Step) -> None:
        if self._bar:
            at, total = step.place
            self._bar.update(self._task, completed=at, total=total, figures=figures(step))

    def stop(self) -> None:
        if self._bar:
            self._bar.stop()
        self._bar = None


def figures(step: Step) -> str:
    at, total = step.place
    return (
        f"{step.phase or f'stage {step.stage}'}, step {at}/{total}, "
        f"loss {step.loss:.4f}, {step.rate:.0f} {step.unit}"
    )
