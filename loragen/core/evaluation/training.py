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
from random import Random

from loragen.core.base.load import LanguageModel, base_dtype, load_training_base
from loragen.core.config import LoraTrainConfig
from loragen.core.config.schema import CheckpointsSection, PluginSection
from loragen.core.data.dataset import Dataset, Row
from loragen.core.errors import DataError, UsageError
from loragen.core.evaluation.contestants import TrainedAdapter
from loragen.core.evaluation.targets import Target
from loragen.core.files import sha256_text, write_text
from loragen.core.learning.sources import TrainingSource
from loragen.core.lora.tasks import IGNORED_ON_RESUME, Task, earlier_runs
from loragen.core.lora.train import train_adapter
from loragen.core.plugins import create, find
from loragen.core.progress import Progress
from loragen.core.run.checkpoints import load_adapter
from loragen.core.run.directory import CHECKPOINTS, LoraRun, checkpoint_name, checkpoint_step
from loragen.core.run.metrics import METRICS, read_metrics

log = logging.getLogger(__name__)

RATES = (0.3, 1.0, 3.0)
"""The learning rates that the multi-task LoRA tries, in units of the highest of one adapter's
schedule."""
VALIDATION_SHARE, VALIDATION_ROWS = 0.05, 128
"""Share of the rows of all datasets that early stopping validates on, and their most."""
PATIENCE = 0.1
"""Share of its most steps without improvement after which it stops: many datasets are learned more
slowly than one, but it waits as long as the training of one adapter in any case."""
MOST_STEPS = 4
"""The limit of each multi-task training, as a multiple of the steps of all training adapters."""


def train_multi_task(
    sources: Sequence[TrainingSource],
    base: LanguageModel,
    cache: Path,
    progress: Progress,
    most_steps: int | None = None,
) -> TrainedAdapter:
    """Trains a LoRA on the rows of all of the generator's training datasets together, at each of
    `RATES`; returns the one with the lowest validation loss, and those it has beaten.

    `most_steps` limits each of the trainings; by default, `MOST_STEPS` times the collection.
    Raises UsageError if the training adapters have no run or no dataset, DataError for bad rows.
    """
    collected = [_run_of(source) for source in sources]
    datasets = [source.labels for source in sources if source.labels]
    if missing := [source.name for source in sources if source.labels is None]:
        problem = "its dataset is unknown; leave out --multi-task"
        raise UsageError(*(f"{name}: {problem}" for name in missing))
    rows = [row for data in datasets for row in data.rows(skip_bad_rows=True)]
    dataset = _dataset_of(rows, cache / "multi-task", "multi-task")
    limit = most_steps or MOST_STEPS * sum(run.manifest.max_steps for run in collected)
    recipe = _recipe(collected[0].config, base, cache)
    training_base = _TrainingBase(recipe, base)

    configs = [multi_task_config(recipe, limit, len(rows), rate) for rate in RATES]
    runs = [_train_once(config, dataset, training_base, progress) for config in configs]
    first, *others = sorted(runs, key=lambda run: min(validation_losses(run).values()))
    log.info(
        "multi-task: learning rate %g, %d steps; chosen on validation rows among %d trainings",
        first.config.schedule.options["learning_rate"],
        checkpoint_step(best_checkpoint(first)),
        1 + len(others),
    )
    for run in (first, *others):  # the others are large, and never read again
        best = best_checkpoint(run)
        for file in run.checkpoints:
            if file != best:
                file.unlink()
    return TrainedAdapter(first, best_checkpoint(first), tuple(others))


def train_oracles(
    targets: Sequence[Target],
    sources: Sequence[TrainingSource],
    base: LanguageModel,
    cache: Path,
    progress: Progress,
    known_runs: Sequence[Path] = (),
) -> dict[tuple[str, str], TrainedAdapter]:
    """Trains a LoRA on the labelled train split of every dataset, with the configuration of the
    generator's own training adapters. Returns them by `Target.key`.

    A run of the same training is used if it is in the cache, in a folder of `known_runs`, or beside
    the generator's training runs, as that of a held-out dataset is.
    """
    config, training_base, folders = _labels_recipe(sources, base, cache, known_runs)
    oracles = {}
    for target in targets:
        assert target.train is not None  # `check_oracles`
        run = _train_once(config, target.train, training_base, progress, folders)
        oracles[target.key] = TrainedAdapter(run, run.checkpoints[-1])
    return oracles


def train_labelled(
    targets: Sequence[Target],
    sizes: Sequence[int],
    sources: Sequence[TrainingSource],
    base: LanguageModel,
    cache: Path,
    progress: Progress,
    known_runs: Sequence[Path] = (),
    seed: int = 0,
) -> dict[tuple[str, str, int], TrainedAdapter]:
    """Trains a LoRA on random labelled rows of every dataset's train split, for each number of
    them, otherwise as its oracle. Smaller samples are parts of larger ones; where a train split has
    fewer rows, all are taken, which is the oracle."""
    config, training_base, folders = _labels_recipe(sources, base, cache, known_runs)
    found = {}
    for target in targets:
        assert target.train is not None  # `check_oracles`
        rows = list(target.train_rows)
        Random(f"labels:{seed}:{target.name}").shuffle(rows)
        for size in sizes:
            dataset = target.train
            if size < len(rows):
                name = f"{target.name}-{size}-labels"
                dataset = _dataset_of(rows[:size], cache / "labels", name)
            run = _train_once(config, dataset, training_base, progress, folders)
            found[*target.key, size] = TrainedAdapter(run, run.checkpoints[-1])
    return found


def _labels_recipe(
    sources: Sequence[TrainingSource], base: LanguageModel, cache: Path, known_runs: Sequence[Path]
) -> tuple[LoraTrainConfig, "_TrainingBase", list[Path]]:
    """Returns the configuration of an oracle, its base, and the folders of earlier runs."""
    runs = [_run_of(source) for source in sources]
    config = _recipe(runs[0].config, base, cache)
    config.checkpoints = CheckpointsSection(first_step=config.training.max_steps, optimizer="none")
    folders = [*known_runs, *(run.directory.parent for run in runs)]
    return config, _TrainingBase(config, base), list(dict.fromkeys(folders))


def _dataset_of(rows: Sequence[Row], folder: Path, name: str) -> Dataset:
    """Returns a dataset of these rows, in a file named after its content."""
    documents = [asdict(row) for row in rows]
    for document in documents:
        del document["line"], document["also_right"]  # a training reads neither
    text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in documents)
    file = folder / f"{sha256_text(text)[:32]}.jsonl"
    if not (file.is_file() and file.read_bytes() == text.encode()):
        write_text(file, text)
    return Dataset(file, name)


def _run_of(source: TrainingSource) -> LoraRun:
    if source.run is None:
        raise UsageError(
            f"{source.name}: not a run of lora train, so the configuration of its training is "
            "unknown; leave out --oracle and --multi-task"
        )
    return source.run


def multi_task_config(
    config: LoraTrainConfig, most_steps: int, rows: int, rate: float = 1.0
) -> LoraTrainConfig:
    """Returns the configuration of one dataset's adapter for so many `rows` of all datasets, with
    `rate` times the schedule's highest learning rate as a constant, and early stopping."""
    steps, own = config.training.max_steps, config.model_copy(deep=True)
    schedule = create("schedule", config.schedule.name, config.schedule.options)
    highest = max(schedule(step, steps).learning_rate for step in range(1, steps + 1))
    options = find("schedule", "constant").Config(learning_rate=rate * highest).model_dump()
    own.schedule = PluginSection.model_validate({"name": "constant", **options})
    own.data.val_ratio, own.data.validation = min(VALIDATION_SHARE, VALIDATION_ROWS / rows), None
    own.lora.freeze_a = False  # that is for adapters that are to be added up
    own.training.max_steps = most_steps
    own.training.patience = max(steps, round(PATIENCE * most_steps))
    own.training.val_every = max(1, own.training.patience // 3)
    every = own.training.val_every  # one per validation; the best is used
    own.checkpoints = CheckpointsSection(first_step=every, every=every, optimizer="none")
    return own


def best_checkpoint(run: LoraRun) -> Path:
    """Returns the checkpoint with the lowest validation loss; early stopping ends after it."""
    losses = validation_losses(run)
    best = min(losses, key=lambda step: losses[step])
    return run.directory / CHECKPOINTS / checkpoint_name(best)


def validation_losses(run: LoraRun) -> dict[int, float]:
    """Returns {step: validation loss}."""
    return {
        int(entry["step"]): entry["val/loss"]
        for entry in read_metrics(run.directory / METRICS)
        if "val/loss" in entry
    }


def _recipe(config: LoraTrainConfig, base: LanguageModel, cache: Path) -> LoraTrainConfig:
    """Returns the configuration of the generator's training adapters, for this base model and
    without the files that the comparison does not need."""
    own = config.model_copy(deep=True)
    own.base_model, own.runs_dir = base.name, str(cache / "runs")
    own.trust_remote_code = base.trust_remote_code  # whatever a run from elsewhere says
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
    config: LoraTrainConfig,
    dataset: Dataset,
    base: _TrainingBase,
    progress: Progress,
    folders: Sequence[Path] = (),
) -> LoraRun:
    """Trains an adapter, or finds it in the cache or in one of the `folders` of runs, whose last
    checkpoint counts, whichever others were kept."""
    task = Task(dataset, dataset.name)
    for folder in (Path(config.runs_dir), *folders):
        ignored = () if folder == Path(config.runs_dir) else ("checkpoints",)
        there = config.model_copy(update={"runs_dir": str(folder)})
        known = earlier_runs(there, task, (*IGNORED_ON_RESUME, *ignored)).finished
        if known and known.manifest.base_fingerprint == base.fingerprint:
            try:
                for file in known.checkpoints if not ignored else known.checkpoints[-1:]:
                    load_adapter(file)
            except DataError as error:
                log.warning("%s; it is trained anew", error)
                continue
            log.info("%s: already trained, %s", dataset.name, known.directory)
            return known
    try:
        return train_adapter(config, dataset, base.model, progress)
    finally:
        progress.command_ended()
