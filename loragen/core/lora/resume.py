"""Going on with a run exactly where a checkpoint left it.

Batches, dropout and learning rates are functions of (seed, step), so a checkpoint needs no more
than the adapter, the optimizer's moments and the step: the steps after it are those of a run that
was never interrupted, bit for bit on one kind of hardware.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch.utils._pytree import tree_map_only

from loragen.core.base_models import BaseModel
from loragen.core.checkpoints import load_plain
from loragen.core.config import LoraTrainConfig
from loragen.core.errors import DataError, UsageError
from loragen.core.lora.data import Rows
from loragen.core.lora.identity import HARDWARE, differences
from loragen.core.lora.precision import dtype_name, load_training_base
from loragen.core.metrics_log import METRICS, read_metrics
from loragen.core.runs import (
    LAST_CHECKPOINT,
    LoraManifest,
    checkpoint_files,
    checkpoint_step,
    read_run,
    run_directory_of,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResumePoint:
    """A run and what of it is there already."""

    directory: Path
    manifest: LoraManifest
    config: LoraTrainConfig
    checkpoint: Path | None
    """None: the run ended before its first checkpoint and starts again."""
    step: int
    """Optimizer steps done."""


def find_resume_point(path: Path) -> ResumePoint:
    """The run at `path`, or that the checkpoint `path` is of; a run's newest checkpoint counts.

    Raises UsageError where there is no run or the checkpoint cannot be gone on from.
    """
    if not path.exists():
        raise UsageError(f"{path}: no such run or checkpoint")
    directory = run_directory_of(path)
    run, config = read_run(directory)
    checkpoint = path if path.is_file() else newest_checkpoint(directory)
    step = _progress(checkpoint)[1] if checkpoint else 0
    return ResumePoint(directory, run.manifest, config, checkpoint, step)


def newest_checkpoint(directory: Path) -> Path | None:
    """Of the highest step among those that carry the optimizer's state; else of the highest.

    Raises DataError where there are checkpoints and none can be read.
    """
    last = directory / LAST_CHECKPOINT
    files = [*checkpoint_files(directory), *([last] if last.is_file() else [])]
    ranked: list[tuple[bool, int, Path]] = []
    for file in reversed(files):
        try:
            ranked.append((*_progress(file), file))
        except DataError as error:
            if file == files[0] and not ranked:
                raise
            log.warning("%s; looking for an older one", error)
        if len(ranked) == 2:  # the newest kept one, and last.ckpt
            break
    return max(ranked)[2] if ranked else None


def _progress(file: Path) -> tuple[bool, int]:
    """Whether a checkpoint carries the optimizer's state, and its step."""
    document = load_plain(file)
    step = document.get("global_step")
    if type(step) is not int:
        raise DataError(f"{file}: does not say its step (global_step): training cannot go on")
    return bool(document.get("optimizer_states")), step


def nothing_left(point: ResumePoint, config: LoraTrainConfig) -> bool:
    """Whether this is the end of a run that ended well, be it by early stopping."""
    manifest = point.manifest
    return (
        manifest.status == "success"
        and point.step >= max(manifest.steps, default=manifest.max_steps)
        and not differences(point.config, config)
    )


def load_base_again(point: ResumePoint, config: LoraTrainConfig) -> BaseModel:
    """The base, in what it computed in before: here `auto` might choose another dtype."""
    dtype = point.manifest.base_dtype or config.base_dtype
    return load_training_base(config.model_copy(update={"base_dtype": dtype}))


def check_settings(point: ResumePoint, config: LoraTrainConfig) -> None:
    """What can be said without data and base in memory. Raises UsageError, as below."""
    _refuse(point, differences(point.config, config))


def check_unchanged(
    point: ResumePoint, config: LoraTrainConfig, rows: Rows, base: BaseModel
) -> None:
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
    _refuse(point, problems)
    if any(getattr(point.config.trainer, key) != getattr(config.trainer, key) for key in HARDWARE):
        log.warning("going on on other hardware: equal to an unbroken run up to rounding only")


def _refuse(point: ResumePoint, problems: Sequence[str]) -> None:
    if problems:
        raise UsageError(*(f"{point.directory} cannot go on: {problem}" for problem in problems))


def restore_adapter(model: Any, document: Mapping[str, Any]) -> None:
    """Raises DataError where the checkpoint's tensors are not exactly the adapter's."""
    state = {key.removeprefix("model."): value for key, value in document["state_dict"].items()}
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    if wanted != state.keys():
        raise DataError("the checkpoint's tensors are not those of the run's adapter")
    model.load_state_dict(state, strict=False)


def restore_progress(trainer: Any, document: Mapping[str, Any]) -> None:
    """Puts the trainer and its callbacks to the checkpoint's step, before `fit`.

    Lightning's own restart counts from inside a step and an epoch; ours is always between two.
    """
    step = int(document["global_step"])
    epoch = trainer.fit_loop.epoch_loop
    optimizer = epoch.automatic_optimization.optim_progress.optimizer.step.total
    optimizer.ready = optimizer.completed = step
    batches = epoch.batch_progress.total  # validation counts the batches of the whole run
    done = step * trainer.accumulate_grad_batches
    batches.ready = batches.started = batches.processed = batches.completed = done
    for callback in trainer.callbacks:
        if callback.state_key in document.get("callbacks", {}):
            callback.load_state_dict(document["callbacks"][callback.state_key])
    precision = trainer.precision_plugin
    stopping = [c for c in trainer.callbacks if isinstance(c, EarlyStopping)]
    if any(callback.wait_count >= callback.patience for callback in stopping):
        epoch.max_steps = step  # the run had stopped by itself, and only its results are missing
    if type(precision).__qualname__ in document:  # the loss scale of 16-mixed
        precision.load_state_dict(document[type(precision).__qualname__])


def optimizer_state(document: Mapping[str, Any]) -> dict[str, Any] | None:
    """The optimizer's state, on the CPU; None, with a warning, where the checkpoint has none."""
    states = document.get("optimizer_states") or []
    if not states:
        log.warning("the checkpoint has no optimizer state: the optimizer starts afresh, not exact")
        return None
    return dict(states[0])


def void_later(point: ResumePoint) -> None:
    """Removes the checkpoints of steps that will be done again: a second kill must not find them
    without their metrics."""
    for file in checkpoint_files(point.directory):
        if checkpoint_step(file) > point.step:
            file.unlink()
    if point.checkpoint is None or point.checkpoint.name != LAST_CHECKPOINT.name:
        (point.directory / LAST_CHECKPOINT).unlink(missing_ok=True)


def logged_loss(point: ResumePoint) -> float | None:
    """The loss of the step that the run goes on after."""
    file = point.directory / METRICS
    entries = read_metrics(file) if file.is_file() else []
    losses = [e["train/loss"] for e in entries if e["step"] == point.step and "train/loss" in e]
    return losses[-1] if losses else None


def read_resumable(point: ResumePoint) -> dict[str, Any] | None:
    """The checkpoint, in memory: the run will replace the very file that it goes on from."""
    if point.checkpoint is None:
        return None
    document: dict[str, Any] = tree_map_only(
        torch.Tensor, torch.clone, load_plain(point.checkpoint)
    )
    return document
