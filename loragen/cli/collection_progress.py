"""The progress of a collection on stderr: a table on a terminal, plain lines elsewhere."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich.markup import escape

from loragen.cli import render
from loragen.cli.progress import figures, terminal_progress
from loragen.core.lora.collect import CollectionProgress, Outcome, Task
from loragen.core.progress import Progress, Silent, Step

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

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

    def ended(self, outcome: Outcome) -> None:
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

    def ended(self, outcome: Outcome) -> None:
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

    def ended(self, outcome: Outcome) -> None:
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


def _told(outcome: Outcome) -> str:
    if outcome.status == "trained" and outcome.run:
        return f"done in {outcome.run.manifest.seconds or 0:.0f} s: {outcome.run.directory}"
    return f"{outcome.status}: {outcome.reason}" if outcome.status != "skipped" else outcome.reason
