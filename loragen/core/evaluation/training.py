"""The adapters that are trained for the comparison, on demand and once.

A run is found again by the bytes of its data, its base model and its settings, as in `lora train`.
The cache may be deleted at any time.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

from loragen.core.base.load import LanguageModel, base_dtype, load_training_base
from loragen.core.config import LoraTrainConfig
from loragen.core.config.schema import CheckpointsSection, PluginSection
from loragen.core.data.dataset import Dataset
from loragen.core.errors import UsageError
from loragen.core.evaluation.contestants import TrainedAdapter
from loragen.core.evaluation.targets import Target
from loragen.core.files import sha256_text, write_text
from loragen.core.learning.sources import TrainingSource
from loragen.core.lora.tasks import Task, earlier_runs
from loragen.core.lora.train import train_adapter
from loragen.core.plugins import create
from loragen.core.progress import Progress
from loragen.core.run.directory import CHECKPOINTS, LoraRun, checkpoint_name
from loragen.core.run.loggers import METRICS, read_metrics

log = logging.getLogger(__name__)

VALIDATION_SHARE = 0.05
"""Share of the rows of all datasets that early stopping validates on."""
MOST_STEPS = 4
"""The limit of the multi-task training, as a multiple of the steps of all training adapters."""


def train_multi_task(
    sources: Sequence[TrainingSource], base: LanguageModel, cache: Path, progress: Progress
) -> TrainedAdapter:
    """Trains one LoRA on the rows of all of the generator's training datasets together.

    Raises UsageError if the training adapters have no run or no dataset, DataError for bad rows.
    """
    runs = [_run_of(source) for source in sources]
    datasets = [source.labels for source in sources if source.labels]
    if missing := [source.name for source in sources if source.labels is None]:
        problem = "its dataset is unknown; leave out --multi-task"
        raise UsageError(*(f"{name}: {problem}" for name in missing))
    documents = [asdict(row) for data in datasets for row in data.rows(skip_bad_rows=True)]
    for document in documents:
        del document["line"]
    text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in documents)
    file = cache / "multi-task" / f"{sha256_text(text)[:32]}.jsonl"
    if not file.is_file():
        write_text(file, text)
    most_steps = MOST_STEPS * sum(run.manifest.max_steps for run in runs)
    config = multi_task_config(_recipe(runs[0].config, base, cache), most_steps)
    dataset = Dataset(file, "multi-task")
    run = _train_once(config, dataset, _TrainingBase(config, base), progress)
    return TrainedAdapter(run, best_checkpoint(run))


def train_oracles(
    targets: Sequence[Target],
    sources: Sequence[TrainingSource],
    base: LanguageModel,
    cache: Path,
    progress: Progress,
) -> dict[tuple[str, str], TrainedAdapter]:
    """Trains a LoRA on the labelled train split of every dataset, with the configuration of the
    generator's own training adapters. Returns them by `Target.key`."""
    config = _recipe(_run_of(sources[0]).config, base, cache)
    config.checkpoints = CheckpointsSection(first_step=config.training.max_steps, optimizer="none")
    training_base, oracles = _TrainingBase(config, base), {}
    for target in targets:
        assert target.train is not None  # `check_oracles`
        run = _train_once(config, target.train, training_base, progress)
        oracles[target.key] = TrainedAdapter(run, run.checkpoints[-1])
    return oracles


def _run_of(source: TrainingSource) -> LoraRun:
    if source.run is None:
        raise UsageError(
            f"{source.name}: not a run of lora train, so the configuration of its training is "
            "unknown; leave out --oracle and --multi-task"
        )
    return source.run


def multi_task_config(config: LoraTrainConfig, most_steps: int) -> LoraTrainConfig:
    """Returns the configuration of one dataset's adapter, with the schedule's highest learning rate
    as a constant, and early stopping after as many steps without improvement as that one has."""
    steps, own = config.training.max_steps, config.model_copy(deep=True)
    schedule = create("schedule", config.schedule.name, config.schedule.options)
    highest = max(schedule(step, steps).learning_rate for step in range(1, steps + 1))
    own.schedule = PluginSection.model_validate({"name": "constant", "learning_rate": highest})
    own.data.val_ratio, own.data.validation = VALIDATION_SHARE, None
    own.training.max_steps, own.training.patience = most_steps, steps
    own.training.val_every = max(1, steps // 5)
    every = own.training.val_every  # one per validation; the best is used
    own.checkpoints = CheckpointsSection(first_step=every, every=every, optimizer="none")
    return own


def best_checkpoint(run: LoraRun) -> Path:
    """Returns the checkpoint with the lowest validation loss; early stopping ends after it."""
    losses = {
        int(entry["step"]): entry["val/loss"]
        for entry in read_metrics(run.directory / METRICS)
        if "val/loss" in entry
    }
    best = min(losses, key=lambda step: losses[step])
    return run.directory / CHECKPOINTS / checkpoint_name(best)


def _recipe(config: LoraTrainConfig, base: LanguageModel, cache: Path) -> LoraTrainConfig:
    """Returns the configuration of the generator's training adapters, for this base model and
    without the files that the comparison does not need."""
    own = config.model_copy(deep=True)
    own.base_model, own.runs_dir = base.name, str(cache / "runs")
    own.final_model, own.track_batches, own.loggers = "none", False, {}
    own.data.skip_bad_rows = True  # the targets were read before, which raises for bad rows
    return own


class _TrainingBase:
    """The base model as `lora train` loads it, loaded when training starts; the evaluated model
    itself if dtype and quantization are the same."""

    def __init__(self, config: LoraTrainConfig, evaluated: LanguageModel) -> None:
        self.config, self.evaluated = config, evaluated

    @cached_property
    def model(self) -> LanguageModel:
        config, model = self.config, self.evaluated.model
        if config.base_quantization == "none" and model.dtype == base_dtype(config, model):
            return self.evaluated
        return load_training_base(config)

    @property
    def fingerprint(self) -> str:
        """The fingerprint in a run's manifest: of the stored weights, or of the quantized ones."""
        stored = self.config.base_quantization == "none"
        return (self.evaluated if stored else self.model).fingerprint


def _train_once(
    config: LoraTrainConfig, dataset: Dataset, base: _TrainingBase, progress: Progress
) -> LoraRun:
    known = earlier_runs(config, Task(dataset, dataset.name)).finished
    if known and known.manifest.base_fingerprint == base.fingerprint:
        log.info("%s: already trained, %s", dataset.name, known.directory)
        return known
    try:
        return train_adapter(config, dataset, base.model, progress)
    finally:
        progress.command_ended()
