"""Going on with the training of a generator: what has to be the same, and what becomes void."""

import logging
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from loragen.core.config import GenTrainConfig, load
from loragen.core.config.differences import HARDWARE, differences, other_hardware
from loragen.core.config.gen_schema import SourceSection
from loragen.core.data.documents import location, parsed_source
from loragen.core.errors import DataError
from loragen.core.files import user_path
from loragen.core.generator.collections.found import configured_sources
from loragen.core.manifests import GeneratorManifest, SourceRecord, read_manifest
from loragen.core.resume import ResumePoint, newest, progress_of
from loragen.core.runs import CHECKPOINT_SUFFIX, CHECKPOINTS, CONFIG, resumable_run

log = logging.getLogger(__name__)

GeneratorPoint: TypeAlias = ResumePoint[GeneratorManifest, GenTrainConfig]

FREE = (
    "experiments_dir",
    "loggers",
    # What the sources hold is compared by hash, wherever it lies.
    "sources",
    "val_sources",
    "data.checkpoint_dir",
    "data.prompts",
    "data.cache_tokenized",
    "data.cache_dir",
    "training.last_every",
    *HARDWARE,
)


def find_resume_point(path: Path) -> GeneratorPoint:
    """The run at `path`, or that the checkpoint `path` is of; a run's newest checkpoint counts.

    Raises UsageError where there is no run or the checkpoint cannot be gone on from.
    """
    directory = resumable_run(path, GeneratorManifest)
    manifest = read_manifest(directory, GeneratorManifest)
    config = load(GenTrainConfig, directory / CONFIG, environment={})
    checkpoint = path if path.is_file() else newest(_by_age(directory))
    step = progress_of(checkpoint)[1] if checkpoint else 0
    return ResumePoint(directory, manifest, config, checkpoint, step)


def nothing_left(point: GeneratorPoint, config: GenTrainConfig) -> bool:
    """Whether this is the end of a run that ended well."""
    manifest = point.manifest
    return (
        manifest.status == "success"
        and point.step >= manifest.steps
        and not _differences(point, config)
    )


def settled(point: GeneratorPoint, config: GenTrainConfig) -> GenTrainConfig:
    """With the objective that `auto` had come to: what else is on this machine may have changed."""
    asked = config.training.objective
    return config.with_objective(point.config.training.objective if asked == "auto" else asked)


def check_settings(point: GeneratorPoint, config: GenTrainConfig) -> None:
    """What can be said before the sources are read. Raises UsageError, as below."""
    point.refuse(_differences(point, config))


def check_unchanged(
    point: GeneratorPoint, config: GenTrainConfig, manifest: GeneratorManifest
) -> None:
    """Raises UsageError naming every difference between the run and what would go on with it."""
    then = point.manifest
    problems = _differences(point, config)
    if then.encoder_fingerprint not in ("", manifest.encoder_fingerprint):
        problems.append(f"the encoder {config.encoder.name} has other weights")
    if then.base_fingerprint not in ("", manifest.base_fingerprint):
        problems.append("the base model has other weights")
    if then.source_records:
        problems += _other_sources(then.source_records, manifest.source_records)
    point.refuse(problems)
    if other_hardware(point.config, config):
        log.warning("going on on other hardware: equal to an unbroken run up to rounding only")


def located(config: GenTrainConfig) -> GenTrainConfig:
    """With the sources that were found, by their absolute places: a run is gone on with from other
    directories, and learns from what it began with, whatever has come to a folder of runs since."""
    found = config.model_copy(deep=True)
    found.sources = [_located(source) for source in configured_sources(config)]
    found.val_sources = [_located(source) for source in config.val_sources]
    found.data.checkpoint_dir = None
    base = found.behaviour.base_model
    if base and user_path(base).is_dir():
        found.behaviour.base_model = str(user_path(base).absolute())
    if config.data.prompts is not None:
        found.data.prompts = str(Path(config.data.prompts).absolute())
    return found


def _differences(point: GeneratorPoint, config: GenTrainConfig) -> list[str]:
    return differences(point.config, settled(point, config), FREE)


def _located(source: SourceSection) -> SourceSection:
    """With absolute paths."""
    places = {
        key: str(Path(place).absolute())
        for key, place in (("run", source.run), ("checkpoints", source.checkpoints))
        if place is not None
    }
    if source.prompts is not None:
        places["prompts"] = location(parsed_source(source.prompts))
    return source.model_copy(update=places)


def restore_weights(module: nn.Module, document: dict[str, Any]) -> None:
    """Raises DataError where the checkpoint's tensors are not exactly the module's."""
    try:
        module.load_state_dict(document["state_dict"])
    except (RuntimeError, KeyError) as error:
        raise DataError("the checkpoint's tensors are not those of this generator") from error


def void_later(point: GeneratorPoint) -> None:
    """Removes the checkpoints of steps that will be done again."""
    for file in _by_age(point.directory):
        if file != point.checkpoint and progress_of(file)[1] > point.step:
            file.unlink()


def _by_age(directory: Path) -> list[Path]:
    """The best and the last: an order of their steps, without opening them."""
    files = (directory / CHECKPOINTS).glob(f"*{CHECKPOINT_SUFFIX}")
    return sorted(files, key=lambda file: file.stat().st_mtime_ns)


def _other_sources(then: list[SourceRecord], now: list[SourceRecord]) -> list[str]:
    names = [[(one.name, one.held_out) for one in records] for records in (then, now)]
    if names[0] != names[1]:
        told = [", ".join(name for name, _ in one) for one in names]
        return [f"the sources are {told[1]}, the run has {told[0]} (order and roles count)"]
    problems = []
    for old, new in zip(then, now, strict=True):
        if old.checkpoints != new.checkpoints:
            problems.append(f"{new.name} has other checkpoints")
        if old.prompts != new.prompts:
            problems.append(f"{new.name} has other prompts")
        if old.labels not in ("", new.labels):
            problems.append(f"{new.name} has other labelled rows, or they make other tokens")
    return problems
