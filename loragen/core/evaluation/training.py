"""The contestants that have to be trained: on demand, and once.

A run is found again by the bytes of its data, its base and its settings, as `lora train` finds
what is done already; so the cache may be deleted at any time.
"""

import json
import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from loragen.core.base.load import LanguageModel, base_dtype, load_training_base
from loragen.core.config import LoraTrainConfig
from loragen.core.config.schema import CheckpointsSection, ScheduleSection
from loragen.core.data.documents import Source, parsed_source
from loragen.core.data.rows import Row, read_rows
from loragen.core.evaluation.contestants import Trained
from loragen.core.evaluation.targets import Target
from loragen.core.files import sha256_text, write_text
from loragen.core.learning.sources import TrainingSource
from loragen.core.lora.tasks import Task, finished_run
from loragen.core.lora.train import train
from loragen.core.plugins import create
from loragen.core.progress import Progress
from loragen.core.run.directory import (
    CHECKPOINTS,
    LoraRun,
    checkpoint_name,
    read_run,
    run_directory_of,
)
from loragen.core.run.loggers import METRICS, read_metrics

log = logging.getLogger(__name__)

HELD_OUT = 0.05  # share of the rows of all datasets that early stopping looks at
MOST_STEPS = 4  # times those of the whole collection, should early stopping never come


def train_multi_task(
    sources: Sequence[TrainingSource], base: LanguageModel, cache: Path, progress: Progress
) -> Trained:
    """One LoRA for the rows of all of the generator's training datasets together.

    Raises LoragenError where a run or its dataset is not there any more.
    """
    runs = [read_run(run_directory_of(source.checkpoints[0])) for source in sources]
    rows = [row for run, _ in runs for row in _rows_of(run)]
    text = "".join(_line(row) for row in rows)
    file = cache / "multi-task" / f"{sha256_text(text)[:32]}.jsonl"
    if not file.is_file():
        write_text(file, text)
    together = sum(run.manifest.max_steps for run, _ in runs)
    config = multi_task_config(_recipe(runs[0][1], base, cache), MOST_STEPS * together)
    run = _trained_once(config, "multi-task", file, _TrainingBase(config, base), progress)
    return Trained(best_checkpoint(run.directory), run.manifest.seconds or 0.0, _steps(run))


def train_oracles(
    targets: Sequence[Target],
    sources: Sequence[TrainingSource],
    base: LanguageModel,
    cache: Path,
    progress: Progress,
) -> dict[tuple[str, str], Trained]:
    """A LoRA for every dataset, on the labels of its train split, as the generator's own training
    adapters were trained."""
    _, config = read_run(run_directory_of(sources[0].checkpoints[0]))
    config = _recipe(config, base, cache)
    config.checkpoints = CheckpointsSection(first_step=config.training.max_steps, optimizer="none")
    computing, found = _TrainingBase(config, base), {}
    for target in targets:
        assert target.train_source is not None
        run = _trained_once(config, target.name, target.train_source, computing, progress)
        found[target.key] = Trained(run.directory, run.manifest.seconds or 0.0, _steps(run))
    return found


def multi_task_config(config: LoraTrainConfig, steps: int) -> LoraTrainConfig:
    """As one dataset's adapter, but at a constant rate, the highest of its schedule, and until the
    loss on held-out rows has not improved for as many steps as one dataset's adapter was trained
    for; `steps` at most."""
    one, own = config.training.max_steps, config.model_copy(deep=True)
    schedule = create("schedule", config.schedule.name, config.schedule.options)
    highest = max(schedule(step, one).learning_rate for step in range(1, one + 1))
    own.schedule = ScheduleSection.model_validate({"name": "constant", "learning_rate": highest})
    own.data.val_ratio, own.data.validation = HELD_OUT, None
    own.training.max_steps, own.training.patience = steps, one
    own.training.val_every = max(1, one // 5)
    every = own.training.val_every  # a checkpoint for every validation: the best is taken
    own.checkpoints = CheckpointsSection(first_step=every, every=every, optimizer="none")
    return own


def best_checkpoint(run: Path) -> Path:
    """The one with the lowest loss on held-out rows: early stopping ends some steps after it."""
    losses = {
        int(entry["step"]): entry["val/loss"]
        for entry in read_metrics(run / METRICS)
        if "val/loss" in entry
    }
    return run / CHECKPOINTS / checkpoint_name(min(losses, key=lambda step: losses[step]))


def _recipe(config: LoraTrainConfig, base: LanguageModel, cache: Path) -> LoraTrainConfig:
    """How the generator's training adapters were made, on this base, with nothing else written."""
    own = config.model_copy(deep=True)
    own.base_model, own.runs_dir = base.name, str(cache / "runs")
    own.final_model, own.track_batches, own.loggers = "none", False, {}
    own.data.skip_bad_rows = True  # who minds them has been told when the targets were read
    return own


class _TrainingBase:
    """The base in the dtype in which `lora train` would have it, loaded when something trains; the
    evaluated one itself where that computes so already."""

    def __init__(self, config: LoraTrainConfig, evaluated: LanguageModel) -> None:
        self.config, self.evaluated = config, evaluated

    @cached_property
    def loaded(self) -> LanguageModel:
        config, model = self.config, self.evaluated.model
        if config.base_quantization == "none" and model.dtype == base_dtype(config, model):
            return self.evaluated
        return load_training_base(config)

    @property
    def fingerprint(self) -> str:
        """As the manifest of what it trains has it: of the stored weights, or the quantized."""
        stored = self.config.base_quantization == "none"
        return (self.evaluated if stored else self.loaded).fingerprint


def _trained_once(
    config: LoraTrainConfig, name: str, source: Source, base: _TrainingBase, progress: Progress
) -> LoraRun:
    task = Task(name, name, source)
    known = finished_run(config, task)
    if known and known.manifest.base_fingerprint == base.fingerprint:
        log.info("%s: trained before, %s", name, known.directory)
        return known
    try:
        return train(config, name, source, base.loaded, progress)
    finally:
        progress.stop()


def _rows_of(run: LoraRun) -> list[Row]:
    """The rows that a training run learned from."""
    return read_rows(parsed_source(run.manifest.dataset.path), skip_bad_rows=True)


def _line(row: Row) -> str:
    """A row as JSON that is read back as the same row, but for its line."""
    return json.dumps(row.model_dump(exclude={"line"}), ensure_ascii=False) + "\n"


def _steps(run: LoraRun) -> int:
    return run.manifest.steps[-1]
