"""Going on with a run of LoRA training: what has to be the same, and what becomes void."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from loragen.core.base_models import BaseModel
from loragen.core.config import LoraTrainConfig
from loragen.core.config.differences import other_hardware
from loragen.core.errors import DataError
from loragen.core.lora.data import Rows
from loragen.core.lora.identity import differences
from loragen.core.lora.precision import dtype_name, load_training_base
from loragen.core.manifests import LoraManifest
from loragen.core.metrics_log import METRICS, read_metrics
from loragen.core.resume import ResumePoint, newest, progress_of
from loragen.core.runs import (
    LAST_CHECKPOINT,
    checkpoint_files,
    checkpoint_step,
    read_run,
    resumable_run,
)

log = logging.getLogger(__name__)

LoraPoint: TypeAlias = ResumePoint[LoraManifest, LoraTrainConfig]


def find_resume_point(path: Path) -> LoraPoint:
    """The run at `path`, or that the checkpoint `path` is of; a run's newest checkpoint counts.

    Raises UsageError where there is no run or the checkpoint cannot be gone on from.
    """
    directory = resumable_run(path, LoraManifest)
    run, config = read_run(directory)
    checkpoint = path if path.is_file() else newest(_checkpoints(directory))
    step = progress_of(checkpoint)[1] if checkpoint else 0
    return ResumePoint(directory, run.manifest, config, checkpoint, step)


def _checkpoints(directory: Path) -> list[Path]:
    last = directory / LAST_CHECKPOINT
    return [*checkpoint_files(directory), *([last] if last.is_file() else [])]


def nothing_left(point: LoraPoint, config: LoraTrainConfig) -> bool:
    """Whether this is the end of a run that ended well, be it by early stopping."""
    manifest = point.manifest
    return (
        manifest.status == "success"
        and point.step >= max(manifest.steps, default=manifest.max_steps)
        and not differences(point.config, config)
    )


def load_base_again(point: LoraPoint, config: LoraTrainConfig) -> BaseModel:
    """The base, in what it computed in before: here `auto` might choose another dtype."""
    dtype = point.manifest.base_dtype or config.base_dtype
    return load_training_base(config.model_copy(update={"base_dtype": dtype}))


def check_settings(point: LoraPoint, config: LoraTrainConfig) -> None:
    """What can be said without data and base in memory. Raises UsageError, as below."""
    point.refuse(differences(point.config, config))


def check_unchanged(point: LoraPoint, config: LoraTrainConfig, rows: Rows, base: BaseModel) -> None:
    """Raises UsageError naming every difference between the run and what would go on with it."""
    then, now = point.manifest.dataset, rows.record
    problems = differences(point.config, config)
    if then.sha256 not in ("", now.sha256):
        problems.append(f"the data are other data: {now.path} is not the {then.path} of the run")
    elif then.tokens not in ("", now.tokens):
        problems.append("the rows make other tokens: another tokenizer or chat template")
    if then.validation != now.validation:
        problems.append("the validation rows are others (data.validation)")
    if point.manifest.base_fingerprint not in ("", base.fingerprint):
        problems.append(
            f"the base model has other weights: {config.base_model}, "
            f"the run was on {point.manifest.base_model}"
        )
    dtype = dtype_name(base.model.dtype)
    if point.manifest.base_dtype not in ("", dtype):
        problems.append(f"the base computes in {dtype}, the run's in {point.manifest.base_dtype}")
    point.refuse(problems)
    if other_hardware(point.config, config):
        log.warning("going on on other hardware: equal to an unbroken run up to rounding only")


def restore_adapter(model: Any, document: Mapping[str, Any]) -> None:
    """Raises DataError where the checkpoint's tensors are not exactly the adapter's."""
    state = {key.removeprefix("model."): value for key, value in document["state_dict"].items()}
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    if wanted != state.keys():
        raise DataError("the checkpoint's tensors are not those of the run's adapter")
    model.load_state_dict(state, strict=False)


def void_later(point: LoraPoint) -> None:
    """Removes the checkpoints of steps that will be done again: a second kill must not find them
    without their metrics."""
    for file in checkpoint_files(point.directory):
        if checkpoint_step(file) > point.step:
            file.unlink()
    if point.checkpoint is None or point.checkpoint.name != LAST_CHECKPOINT.name:
        (point.directory / LAST_CHECKPOINT).unlink(missing_ok=True)


def logged_loss(point: LoraPoint) -> float | None:
    """The loss of the step that the run goes on after."""
    file = point.directory / METRICS
    entries = read_metrics(file) if file.is_file() else []
    losses = [e["train/loss"] for e in entries if e["step"] == point.step and "train/loss" in e]
    return losses[-1] if losses else None
