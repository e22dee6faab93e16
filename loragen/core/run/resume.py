"""Resuming a run exactly where a checkpoint left it: one stack for every training.

Batches, dropout and learning rates are functions of (seed, step), so a checkpoint needs no more
than the trained weights, the optimizer's moments and the step: the steps after it are those of a
run that was never interrupted, bit for bit on one kind of hardware.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch.utils._pytree import tree_map_only

from loragen.core.config.show import differences, other_hardware
from loragen.core.errors import DataError, UsageError
from loragen.core.run.checkpoints import load_plain
from loragen.core.run.directory import (
    LAST_CHECKPOINT,
    ConfigT,
    ManifestT,
    Run,
    checkpoint_step,
)

log = logging.getLogger(__name__)


@dataclass
class ResumePoint(Run[ManifestT, ConfigT]):
    """A run and the checkpoint from which it resumes. Each training has a subclass."""

    checkpoint: Path | None
    """None: the run ended before its first checkpoint and starts again."""
    step: int
    """Optimizer steps done."""

    kind: ClassVar[type[Any]]
    """The manifest of such runs."""
    free: ClassVar[Sequence[str]]
    """Sections and keys of the configuration that may differ when a run resumes."""

    @classmethod
    def find(cls, path: Path) -> Self:
        """The run at `path` with its newest checkpoint, or with the checkpoint that `path` is.

        Raises UsageError where there is no run, DataError where no checkpoint can be read.
        """
        run = Run.open(path, cls.kind)
        checkpoint = path if path.is_file() else newest(run.checkpoints, run.last_checkpoint)
        step = progress_of(checkpoint)[1] if checkpoint else 0
        return cls(run.directory, run.manifest, checkpoint, step)

    def differences(self, config: ConfigT) -> list[str]:
        """`key is x, the run has y` for every setting that has to be the same and is not."""
        return differences(self.config, config, self.free)

    def is_finished(self, config: ConfigT) -> bool:
        """Whether this is the end of a successful run, which `config` would only repeat."""
        manifest = self.manifest
        ended = manifest.status == "success" and self.step >= manifest.last_step
        return ended and not self.differences(config)

    def check_settings(self, config: ConfigT, problems: Sequence[str] = ()) -> None:
        """Raises UsageError with every setting that differs, and with the `problems` given."""
        found = [*self.differences(config), *problems]
        if found:
            raise UsageError(*(f"{self.directory} cannot resume: {one}" for one in found))

    def check_unchanged(self, config: ConfigT, problems: Sequence[str]) -> None:
        """As `check_settings`, once data and weights were compared, too; other hardware costs a
        warning."""
        self.check_settings(config, problems)
        if other_hardware(self.config, config):
            log.warning("resuming on other hardware: equal to an unbroken run up to rounding only")

    def read(self) -> dict[str, Any] | None:
        """The checkpoint in memory: the run will replace the very file from which it resumes."""
        if self.checkpoint is None:
            return None
        document: dict[str, Any] = tree_map_only(
            torch.Tensor, torch.clone, load_plain(self.checkpoint)
        )
        return document

    def delete_later_checkpoints(self) -> None:
        """Deletes the checkpoints of steps that will be done again: were the run killed a second
        time, it must not find them without their metrics."""
        for file in self.checkpoints:
            if file != self.checkpoint and _step_of(file) > self.step:
                file.unlink()
        if self.checkpoint is None or self.checkpoint.name != LAST_CHECKPOINT.name:
            (self.directory / LAST_CHECKPOINT).unlink(missing_ok=True)


def newest(files: Sequence[Path], last: Path | None = None) -> Path | None:
    """Returns the checkpoint of the highest step among those that carry the optimizer's state, or
    the highest of all where none does.

    `last` and then `files`, from the end, are opened until two could be read: the newest one that
    is kept, and last.ckpt. Raises DataError where there are files and none can be read.
    """
    candidates = [*files, *([last] if last else [])]
    ranked: list[tuple[bool, int, Path]] = []
    for file in reversed(candidates):
        try:
            ranked.append((*progress_of(file), file))
        except DataError as error:
            if file == candidates[0] and not ranked:
                raise
            log.warning("%s; looking for an older one", error)
        if len(ranked) == 2:
            break
    return max(ranked)[2] if ranked else None


def progress_of(file: Path) -> tuple[bool, int]:
    """Returns whether a checkpoint carries the optimizer's state, and its step."""
    document = load_plain(file)
    step = document.get("global_step")
    if type(step) is not int:
        raise DataError(f"{file}: its step is missing (global_step); training cannot resume")
    return bool(document.get("optimizer_states")), step


def _step_of(file: Path) -> int:
    """The step in a checkpoint's name, else in the file; 0 where the file cannot be read."""
    if "step-" in file.stem:
        return checkpoint_step(file)
    try:
        return progress_of(file)[1]
    except DataError:
        return 0


def restore_progress(trainer: Any, document: Mapping[str, Any]) -> None:
    """Sets the trainer and its callbacks to the checkpoint's step, before `fit`.

    Lightning's own restart (`ckpt_path`) counts from inside a step and an epoch, and loads its
    data loaders' state; ours is always between two steps, and batches need no state. So its
    counters are written here, and nowhere else.
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
        epoch.max_steps = step  # early stopping had ended the run; only its results are missing
    if type(precision).__qualname__ in document:  # the loss scale of 16-mixed
        precision.load_state_dict(document[type(precision).__qualname__])


def optimizer_state(document: Mapping[str, Any]) -> dict[str, Any] | None:
    """The optimizer's state, on the CPU; None, with a warning, where the checkpoint has none."""
    states = document.get("optimizer_states") or []
    if not states:
        log.warning(
            "the checkpoint has no optimizer state: the optimizer starts with empty moments, and "
            "the steps will not be exactly those of an unbroken run"
        )
        return None
    return dict(states[0])
