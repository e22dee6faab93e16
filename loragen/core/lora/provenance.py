"""Which lines of a dataset made which step of a run, and the other way round.

A batch is a function of (seed, step), so the answer is computed, not looked up: it is there for a
run that tracked nothing, and it is the same as what a run with `track_batches` wrote down.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loragen.core.config import LoraTrainConfig, load
from loragen.core.data.batches import batch_indices, held_out
from loragen.core.data.documents import Source, content_hash, location, parsed_source
from loragen.core.data.rows import Row, read_rows
from loragen.core.errors import DataError, UsageError
from loragen.core.files import sha256_text, write_json
from loragen.core.plugins import create
from loragen.core.protocols import Rate, Schedule
from loragen.core.run.directory import (
    CONFIG,
    LoraManifest,
    checkpoint_files,
    checkpoint_name,
    checkpoint_step,
    read_manifest,
    run_directory_of,
)
from loragen.core.run.loggers import METRICS, read_metrics

TRACKING = "tracking"


@dataclass(frozen=True)
class Provenance:
    """The rows that a run trains on, and how its steps draw from them."""

    rows: Sequence[Row]
    batch_size: int
    seed: int

    def rows_of(self, step: int) -> list[Row]:
        """The rows of optimizer step `step`, counted from 1, in the order of the batch."""
        indices = batch_indices(len(self.rows), self.batch_size, self.seed, step - 1)
        return [self.rows[index] for index in indices]

    def lines_of(self, step: int) -> list[int]:
        return [row.line for row in self.rows_of(step)]

    def steps_of(self, line: int, steps: Iterable[int]) -> list[int]:
        """Those of `steps` whose batch has the row of that line."""
        return [step for step in steps if line in self.lines_of(step)]


@dataclass(frozen=True)
class TracedRun:
    """A run whose batches are known again."""

    directory: Path
    manifest: LoraManifest
    provenance: Provenance
    schedule: Schedule
    planned_steps: int
    done_steps: int
    """Fewer than planned where the run was stopped, or is still going on."""
    held_out: Sequence[Row]
    """The rows that only validated."""

    def rate(self, step: int) -> Rate:
        return self.schedule(step, self.planned_steps)

    def row_at(self, line: int) -> Row | None:
        """The row of that line, trained on or held out."""
        rows = (*self.provenance.rows, *self.held_out)
        return next((row for row in rows if row.line == line), None)

    def steps_of(self, line: int) -> list[int]:
        """The steps that have trained on the row of that line."""
        return self.provenance.steps_of(line, range(1, self.done_steps + 1))


def provenance_of(config: LoraTrainConfig, rows: Sequence[Row]) -> tuple[Provenance, list[Row]]:
    """From the rows of the whole file; also those that are held out."""
    training, held = held_out(len(rows), config.data.val_ratio, config.seed)
    kept = [rows[index] for index in training]
    provenance = Provenance(kept, config.training.batch_size, config.seed)
    return provenance, [rows[index] for index in held]


def traced_run(path: Path, data: Path | None = None) -> TracedRun:
    """The run at `path`, or that the checkpoint `path` is of; `data` is where its rows are now, if
    elsewhere than they were.

    Raises UsageError where there is no such run or its data are gone, DataError where they are
    other data.
    """
    directory = run_directory_of(path)
    manifest = read_manifest(directory, LoraManifest)
    if manifest.converted_from:
        raise UsageError(f"{directory} was converted: its batches were not drawn by loragen")
    config = load(LoraTrainConfig, directory / CONFIG, environment={})
    source: Source = data or parsed_source(manifest.dataset.path)
    _check_data(directory, manifest, source)
    left_out = set(manifest.dataset.too_long)
    rows = [r for r in read_rows(source, config.data.skip_bad_rows) if r.line not in left_out]
    provenance, held = provenance_of(config, rows)
    schedule = create("schedule", config.schedule.name, config.schedule.options)
    planned, done = config.training.max_steps, done_steps(directory, manifest)
    return TracedRun(directory, manifest, provenance, schedule, planned, done, held)


def done_steps(directory: Path, manifest: LoraManifest) -> int:
    """The last step that a run has done: of a killed one its log knows, not its manifest."""
    file = directory / METRICS
    logged = [int(entry["step"]) for entry in read_metrics(file)] if file.is_file() else []
    kept = map(checkpoint_step, checkpoint_files(directory))
    return max([*logged, *kept, *manifest.steps], default=0)


def _check_data(directory: Path, manifest: LoraManifest, source: Source) -> None:
    then = manifest.dataset.path
    if isinstance(source, Path) and not source.is_file():
        gone = f"{directory}: the rows that it was trained on are gone: {source}"
        raise UsageError(gone if str(source) == then else f"{source}: no such file")
    if content_hash(source) != manifest.dataset.sha256:
        if location(source) == then:
            raise DataError(f"{source} has changed since {directory} was trained on it")
        raise DataError(f"{source}: {directory} was trained on other rows, those of {then}")


def row_hash(row: Row) -> str:
    """Names a row's content, wherever it stands in whatever file."""
    return sha256_text(row.system or "", row.prompt, row.response)[:16]


def tracking_file(directory: Path, dataset: str) -> Path:
    return directory / TRACKING / f"batch_tracking_{dataset}.jsonl"


def tracked_step(provenance: Provenance, step: int, rate: Rate, loss: float) -> dict[str, Any]:
    """One line of `batch_tracking_<dataset>.jsonl`."""
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
    """`checkpoint_mapping_<dataset>.json`: what each checkpoint's own step was trained on; and
    `line_checkpoint_mapping_<dataset>.json`: the checkpoints whose own step had a line."""
    checkpoints = {
        checkpoint_name(step): {
            "step": step,
            "stage": rate.stage,
            "learning_rate": rate.learning_rate,
            "lines": provenance.lines_of(step),
        }
        for step, rate in rates.items()
    }
    by_line: dict[int, list[str]] = defaultdict(list)
    for step in rates:
        for line in dict.fromkeys(provenance.lines_of(step)):
            by_line[line].append(checkpoint_name(step))
    folder = directory / TRACKING
    write_json(folder / f"checkpoint_mapping_{dataset}.json", checkpoints)
    write_json(
        folder / f"line_checkpoint_mapping_{dataset}.json",
        {str(line): by_line[line] for line in sorted(by_line)},
    )
