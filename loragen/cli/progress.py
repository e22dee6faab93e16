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
from loragen.core.progress import OutcomeStatus, Progress, Silent, Step, Validation

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


class PlainProgress(Silent):
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
        at, total = step.position
        if now < self._next and at < total:
            return
        self._next = now + SECONDS_BETWEEN_LINES
        render.note(f"{self._title}: {figures(step)}{self._left(now, step)}")

    def validated(self, validation: Validation) -> None:
        now, (at, total) = time.monotonic(), validation.position
        if now < self._next_validation and at < total and not validation.is_best:
            return
        self._next_validation = now + SECONDS_BETWEEN_LINES
        render.note(f"{self._title}: {measured(validation)}")

    def _left(self, now: float, step: Step) -> str:
        """Of the phase, measured from its first step seen: of a run that goes on, others had the
        ones before."""
        at, total = step.position
        if self._first is None:
            self._first = now, at
        then, first = self._first
        if at in (first, total):
            return ""
        return f", {(now - then) / (at - first) * (total - at):.0f} s left"


class RichProgress(Silent):
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
            at, total = step.position
            self._bar.update(self._task, completed=at, total=total, figures=figures(step))

    def validated(self, validation: Validation) -> None:
        if self._bar:
            line = f"{self._title}: {measured(validation)}"
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def end(self, name: str) -> None:  # noqa: ARG002  # there is but one
        if self._bar:
            self._bar.stop()
        self._bar = None

    def stop(self) -> None:
        self.end("")


def figures(step: Step) -> str:
    at, total = step.position
    rate = f"{step.rate:.0f}" if step.rate >= 10 else f"{step.rate:.2g}"
    return (
        f"{step.phase or f'stage {step.stage}'}, step {at}/{total}, "
        f"loss {step.loss:.4f}, {rate} {step.unit}"
    )


def measured(validation: Validation) -> str:
    """`validated after reconstruction, step 8/40: val/loss 0.1250; the best so far`"""
    at, total = validation.position
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


def collection_progress(datasets: int) -> Progress:
    """One dataset has a bar; several share a table. Only the first process of a launcher tells."""
    if not render.is_first_process():
        return Silent()
    if datasets > 1 and sys.stderr.isatty():
        return TableProgress()
    return LinesProgress(terminal_progress)


class LinesProgress(Silent):
    """The progress of every dataset by itself, and a line for what became of it."""

    def __init__(self, of_one: Callable[[], Progress]) -> None:
        self._of_one = of_one
        self._running: dict[str, Progress] = {}
        self._numbers: dict[str, str] = {}

    def begin(self, names: Sequence[str]) -> None:
        if len(names) > 1:
            self._numbers = {name: f"[{i}/{len(names)}] " for i, name in enumerate(names, start=1)}

    def start(self, name: str, total: int) -> None:
        self._running[name] = self._of_one()
        self._running[name].start(name, total)

    def step(self, step: Step) -> None:
        self._running[step.name].step(step)

    def end(self, name: str) -> None:
        self._running.pop(name, Silent()).end(name)

    def outcome(self, name: str, status: OutcomeStatus, line: str) -> None:
        self.end(name)
        if self._numbers or status == "skipped":
            render.note(f"{self._numbers.get(name, '')}{name}: {line}")

    def stop(self) -> None:
        for name in list(self._running):
            self.end(name)


class TableProgress(Silent):
    """A row per dataset, drawn anew with every step."""

    _live: "Live | None" = None

    def __init__(self) -> None:
        self._rows: dict[str, tuple[str, str]] = {}
        self._changed: dict[str, float] = {}

    def begin(self, names: Sequence[str]) -> None:
        from rich.console import Console
        from rich.live import Live

        self._rows = dict.fromkeys(names, ("waiting", ""))
        self._live = Live(
            console=Console(stderr=True),
            get_renderable=self.table,
            refresh_per_second=4,
            transient=True,  # the summary says the rest
        )
        self._live.start()

    def start(self, name: str, total: int) -> None:
        self._set(name, "training", f"step 0/{total}")

    def step(self, step: Step) -> None:
        self._set(step.name, "training", figures(step))

    def outcome(self, name: str, status: OutcomeStatus, line: str) -> None:
        self._set(name, status, line.removeprefix(status).lstrip(": "))

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
        for name, (status, text) in self._rows.items():
            if name in shown:
                table.add_row(escape(name), f"[{STYLES[status]}]{status}", escape(text))
        return table

    def _set(self, name: str, status: str, text: str) -> None:
        self._rows[name] = (status, text)
        self._changed[name] = time.monotonic()

    def _urgency(self, name: str) -> tuple[bool, float]:
        """What trains comes first, then what has changed last."""
        return self._rows[name][0] != "training", -self._changed.get(name, 0.0)
