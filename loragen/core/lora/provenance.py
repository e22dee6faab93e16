"""The rows of a dataset that a step of a run was trained on, and the steps that a row was used in.

Because a batch is a function of (seed, step), this is computed: it is also known for a run that
tracked nothing, and it equals what a run with `track_batches` has written.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loragen.core.data.batches import batch_indices, train_val_split
from loragen.core.data.dataset import Dataset, Row
from loragen.core.errors import DataError, UsageError
from loragen.core.files import sha256_text, write_json
from loragen.core.plugins import create
from loragen.core.protocols import Rate, Schedule
from loragen.core.run.directory import LoraRun, checkpoint_name, checkpoint_step
from loragen.core.run.metrics import METRICS, read_metrics

TRACKING = "tracking"


@dataclass(frozen=True)
class Provenance:
    """The training rows of a run, and how its steps draw from them. Steps are counted from 1."""

    rows: Sequence[Row]
    batch_size: int
    seed: int

    def rows_of(self, step: int) -> list[Row]:
        """Returns the rows of an optimizer step in the order of the batch."""
        indices = batch_indices(len(self.rows), self.batch_size, self.seed, step - 1)
        return [self.rows[index] for index in indices]

    def lines_of(self, step: int) -> list[int]:
        return [row.line for row in self.rows_of(step)]


@dataclass(frozen=True)
class TracedRun:
    """A run together with the rows of its batches."""

    run: LoraRun
    provenance: Provenance
    held_out: Sequence[Row]
    """The rows used for validation only."""
    schedule: Schedule
    planned_steps: int
    done_steps: int
    """Fewer than planned if the run was stopped or is still running."""

    def rate(self, step: int) -> Rate:
        return self.schedule(step, self.planned_steps)

    def row_at(self, line: int) -> Row | None:
        """Returns the row of that line, used for training or validation."""
        rows = (*self.provenance.rows, *self.held_out)
        return next((row for row in rows if row.line == line), None)

    def steps_of(self, line: int) -> list[int]:
        """Returns the steps that have trained on the row of that line."""
        steps = range(1, self.done_steps + 1)
        return [step for step in steps if line in self.provenance.lines_of(step)]


def traced_run(run: LoraRun, dataset: Dataset | None = None) -> TracedRun:
    """Recomputes the batches of a run. `dataset` has its rows, if they were moved.

    Raises UsageError if the run was converted or its data are missing, DataError if the data
    are not those of the run.
    """
    manifest, config = run.manifest, run.config
    if manifest.converted_from:
        raise UsageError(f"{run.directory}: converted, its batches were not drawn by loragen")
    recorded = manifest.dataset
    dataset = dataset or Dataset.at(recorded.path)
    if dataset.is_missing:
        if str(dataset.source) != recorded.path:
            raise UsageError(f"{dataset}: no such file")
        raise UsageError(f"{run.directory}: the rows it was trained on are gone: {dataset}")
    if dataset.sha256 != recorded.sha256:
        if dataset.location == recorded.path:
            raise DataError(f"{dataset}: has changed since {run.directory} was trained on it")
        raise DataError(f"{dataset}: {run.directory} was trained on other rows: {recorded.path}")
    left_out = set(recorded.too_long)
    rows = [r for r in dataset.rows(config.data.skip_bad_rows) if r.line not in left_out]
    train_indices, val_indices = train_val_split(len(rows), config.data.val_ratio, config.seed)
    # The last step done is in the log of a killed run, but not in its manifest.
    metrics = run.directory / METRICS
    logged = [int(entry["step"]) for entry in read_metrics(metrics)] if metrics.is_file() else []
    saved = map(checkpoint_step, run.checkpoints)
    return TracedRun(
        run,
        Provenance([rows[i] for i in train_indices], config.training.batch_size, config.seed),
        [rows[i] for i in val_indices],
        create("schedule", config.schedule.name, config.schedule.options),
        config.training.max_steps,
        max([*logged, *saved, *manifest.steps], default=0),
    )


def row_hash(row: Row) -> str:
    """Returns a hash of a row's content, whatever its file and line."""
    earlier = (text for turn in row.history for text in turn)
    return sha256_text(row.system or "", *earlier, row.prompt, row.response)[:16]


def tracking_file(directory: Path, dataset: str) -> Path:
    return directory / TRACKING / f"batch_tracking_{dataset}.jsonl"


def tracked_step(provenance: Provenance, step: int, rate: Rate, loss: float) -> dict[str, Any]:
    """Returns a line of `batch_tracking_<dataset>.jsonl`."""
    rows = provenance.rows_of(step)
    return {
        "step": step,
        "stage": rate.stage,
        "learning_rate": rate.learning_rate,
        "loss": loss,
        "lines": [row.line for row in rows],
        "hashes": [row_hash(row) for row in rows],
    }


def write_mappings(
    directory: Path, dataset: str, provenance: Provenance, rates: Mapping[int, Rate]
) -> None:
    """Writes `checkpoint_mapping_<dataset>.json`, the lines of each checkpoint's own step, and
    `line_checkpoint_mapping_<dataset>.json`, the checkpoints whose own step has a line."""
    checkpoints: dict[str, Any] = {
        checkpoint_name(step): {
            "step": step,
            "stage": rate.stage,
            "learning_rate": rate.learning_rate,
            "lines": provenance.lines_of(step),
        }
        for step, rate in rates.items()
    }
    by_line: dict[int, list[str]] = defaultdict(list)
    for name, checkpoint in checkpoints.items():
        for line in dict.fromkeys(checkpoint["lines"]):
            by_line[line].append(name)
    folder = directory / TRACKING
    write_json(folder / f"checkpoint_mapping_{dataset}.json", checkpoints)
    write_json(
        folder / f"line_checkpoint_mapping_{dataset}.json",
        {str(line): by_line[line] for line in sorted(by_line)},
    )
