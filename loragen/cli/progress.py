"""Progress on stderr: a Rich bar on a terminal, a plain line now and then elsewhere.

The progress of a collection on stderr: a table on a terminal, plain lines elsewhere.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich.markup import escape

from loragen.cli import render
from loragen.core.lora.tasks import CollectionProgress, Task, TaskOutcome
from loragen.core.progress import Progress, Silent, Step, Validation

if TYPE_CHECKING:
    from rich.live import Live
    from rich.progress import Progress as Bar
    from rich.progress import TaskID
    from rich.table import Table

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


STYLES = {
    "waiting": "dim",
    "training": "bold",
    "done": "green",
    "skipped": "cyan",
    "failed": "red",
    "interrupted": "yellow",
}
ROWS_BESIDE = 6  # lines of the terminal that are not rows of the table


def collection_progress(datasets: int) -> CollectionProgress:
    """One dataset has a bar; several share a table. Only the first process of a launcher tells."""
    if not render.is_first_process():
        return NoProgress()
    if datasets > 1 and sys.stderr.isatty():
        return TableProgress()
    return LinesProgress(terminal_progress)


class LinesProgress:
    """The progress of every dataset by itself, and a line for what became of it."""

    def __init__(self, of_one: Callable[[], Progress]) -> None:
        self._of_one = of_one
        self._running: dict[Task, Progress] = {}
        self._places: dict[Task, str] = {}

    def begin(self, tasks: Sequence[Task]) -> None:
        if len(tasks) > 1:
            self._places = {task: f"[{i}/{len(tasks)}] " for i, task in enumerate(tasks, start=1)}

    def started(self, task: Task, steps: int) -> None:
        self._running[task] = self._of_one()
        self._running[task].start(task.name, steps)

    def step(self, task: Task, step: Step) -> None:
        self._running[task].step(step)

    def ended(self, outcome: TaskOutcome) -> None:
        self._running.pop(outcome.task, Silent()).stop()
        if self._places or outcome.status == "skipped":
            place = self._places.get(outcome.task, "")
            render.note(f"{place}{outcome.task.name}: {_told(outcome)}")

    def stop(self) -> None:
        for progress in self._running.values():
            progress.stop()


class NoProgress:
    """Of the processes that a launcher started beside the first."""

    def begin(self, tasks: Sequence[Task]) -> None:
        pass

    def started(self, task: Task, steps: int) -> None:
        pass

    def step(self, task: Task, step: Step) -> None:
        pass

    def ended(self, outcome: TaskOutcome) -> None:
        pass

    def stop(self) -> None:
        pass


class TableProgress:
    """A row per dataset, drawn anew with every step."""

    _live: "Live | None" = None

    def __init__(self) -> None:
        self._rows: dict[Task, tuple[str, str]] = {}
        self._changed: dict[Task, float] = {}

    def begin(self, tasks: Sequence[Task]) -> None:
        from rich.console import Console
        from rich.live import Live

        self._rows = dict.fromkeys(tasks, ("waiting", ""))
        self._live = Live(
            console=Console(stderr=True),
            get_renderable=self.table,
            refresh_per_second=4,
            transient=True,  # the summary says the rest
        )
        self._live.start()

    def started(self, task: Task, steps: int) -> None:
        self._set(task, "training", f"step 0/{steps}")

    def step(self, task: Task, step: Step) -> None:
        self._set(task, "training", figures(step))

    def ended(self, outcome: TaskOutcome) -> None:
        status = "done" if outcome.status == "trained" else outcome.status
        self._set(outcome.task, status, _told(outcome).removeprefix(status).lstrip(": "))

    def stop(self) -> None:
        if self._live:
            self._live.stop()
        self._live = None

    def table(self) -> "Table":
        from rich.table import Table

        room = max(3, self._live.console.height - ROWS_BESIDE) if self._live else len(self._rows)
        counts = Counter(status for status, _ in self._rows.values())
        table = Table(caption=", ".join(f"{counts[s]} {s}" for s in STYLES if counts[s]))
        table.add_column("dataset", no_wrap=True)
        table.add_column("status", no_wrap=True)
        table.add_column("", no_wrap=True, overflow="ellipsis")
        shown = set(sorted(self._rows, key=self._urgency)[:room])
        for task, (status, text) in self._rows.items():
            if task in shown:
                table.add_row(escape(task.name), f"[{STYLES[status]}]{status}", escape(text))
        return table

    def _set(self, task: Task, status: str, text: str) -> None:
        self._rows[task] = (status, text)
        self._changed[task] = time.monotonic()

    def _urgency(self, task: Task) -> tuple[bool, float]:
        """What trains comes first, then what has changed last."""
        return self._rows[task][0] != "training", -self._changed.get(task, 0.0)


def _told(outcome: TaskOutcome) -> str:
    if outcome.status == "trained" and outcome.run:
        return f"done in {outcome.run.manifest.seconds or 0:.0f} s: {outcome.run.directory}"
    return f"{outcome.status}: {outcome.reason}" if outcome.status != "skipped" else outcome.reason
