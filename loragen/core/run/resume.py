"""Which settings two configurations of one command differ in. Light.

Going on with a run exactly where a checkpoint left it: what every training needs for it.

Batches, dropout and learning rates are functions of (seed, step), so a checkpoint needs no more
than the trained weights, the optimizer's moments and the step: the steps after it are those of a
run that was never interrupted, bit for bit on one kind of hardware.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch.utils._pytree import tree_map_only

from loragen.core.errors import DataError, UsageError
from loragen.core.run.checkpoints import load_plain
from loragen.core.run.directory import ManifestT
from loragen.core.run.loop import Continued

log = logging.getLogger(__name__)


AnyConfig = TypeVar("AnyConfig")


@dataclass(frozen=True)
class ResumePoint(Generic[ManifestT, AnyConfig]):
    """A run and what of it is there already."""

    directory: Path
    manifest: ManifestT
    config: AnyConfig
    checkpoint: Path | None
    """None: the run ended before its first checkpoint and starts again."""
    step: int
    """Optimizer steps done."""

    def refuse(self, problems: Sequence[str]) -> None:
        """Raises UsageError with every problem, where there is any."""
        if problems:
            raise UsageError(*(f"{self.directory} cannot go on: {one}" for one in problems))

    def read(self) -> dict[str, Any] | None:
        """The checkpoint, in memory: the run will replace the very file that it goes on from."""
        if self.checkpoint is None:
            return None
        document: dict[str, Any] = tree_map_only(
            torch.Tensor, torch.clone, load_plain(self.checkpoint)
        )
        return document

    def continued(self) -> Continued:
        """What the session is told of it."""
        manifest = self.manifest
        return Continued(
            self.directory, self.step, manifest.logger_run_ids, manifest.seconds or 0.0
        )


def newest(files: Sequence[Path]) -> Path | None:
    """Of the highest step among those that carry the optimizer's state; else of the highest.

    `files` are looked at from the last to the first, until two can be read: the newest kept one,
    and last.ckpt. Raises DataError where there are files and none can be read.
    """
    ranked: list[tuple[bool, int, Path]] = []
    for file in reversed(files):
        try:
            ranked.append((*progress_of(file), file))
        except DataError as error:
            if file == files[0] and not ranked:
                raise
            log.warning("%s; looking for an older one", error)
        if len(ranked) == 2:
            break
    return max(ranked)[2] if ranked else None


def progress_of(file: Path) -> tuple[bool, int]:
    """Whether a checkpoint carries the optimizer's state, and its step."""
    document = load_plain(file)
    step = document.get("global_step")
    if type(step) is not int:
        raise DataError(f"{file}: does not say its step (global_step): training cannot go on")
    return bool(document.get("optimizer_states")), step


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
