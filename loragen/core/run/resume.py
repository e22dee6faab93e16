"""Resuming a run exactly at the step of a checkpoint, for every kind of training.

Batches, dropout and learning rates are functions of (seed, step), so a checkpoint needs no more
than the trained weights, the optimizer's moments and the step: the steps after it are those of a
run that was never interrupted, bit for bit on the same hardware.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor
from torch.utils._pytree import tree_map_only

from loragen.core.config.show import differences, other_hardware
from loragen.core.errors import DataError, LoragenError, UsageError, one_line
from loragen.core.progress import is_first_process
from loragen.core.run.checkpoints import load_weights_only
from loragen.core.run.directory import (
    BEST_CHECKPOINT,
    LAST_CHECKPOINT,
    ConfigT,
    ManifestT,
    Run,
    checkpoint_name,
    checkpoint_step,
    read_manifest,
    run_directory_of,
)
from loragen.core.run.lock import RunLock

log = logging.getLogger(__name__)


class ResumableModule(LightningModule):
    """A LightningModule whose training `ResumePoint.restore` can continue."""

    completed_steps = 0
    """Optimizer steps done before this training: 0 unless a run resumes."""
    resumed_optimizer: dict[str, Any] | None = None
    """The state of the optimizer after those steps."""

    def load_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Loads that state, if there is one. Raises DataError if it is of another optimizer."""
        if not self.resumed_optimizer:
            return
        try:
            optimizer.load_state_dict(self.resumed_optimizer)
            for weight, moments in optimizer.state.items():
                for name, value in moments.items():
                    if isinstance(value, Tensor) and value.ndim and value.shape != weight.shape:
                        raise ValueError(
                            f"{name} has shape {list(value.shape)}, expected {list(weight.shape)}"
                        )
        except Exception as error:  # a damaged state may raise anything
            raise DataError(
                f"the checkpoint's optimizer state is not that of this training: {one_line(error)}"
            ) from error
        self.resumed_optimizer = None  # as large as the weights, twice


@dataclass
class ResumePoint(Run[ManifestT, ConfigT], ABC):
    """A run and the checkpoint from which it resumes. Each training has a subclass."""

    checkpoint: Path | None
    """None: the run ended before its first checkpoint and starts again."""
    step: int
    """The number of optimizer steps done."""
    lock: RunLock | None = None
    """The lock of the run, once `acquire` has taken it."""

    kind: ClassVar[type[Any]]
    """The class of the run's manifest."""
    ignored_on_resume: ClassVar[Sequence[str]]
    """Sections and keys of the configuration that may differ when a run resumes."""

    @classmethod
    def find(cls, path: Path, to_write: bool = False) -> Self:
        """Returns the run at `path` with its newest checkpoint, or with the checkpoint `path`.

        `to_write` first takes the lock of the run. Raises UsageError if there is no run or another
        process writes it, DataError if no checkpoint can be read.
        """
        lock = None
        if to_write and path.exists() and is_first_process():
            lock = RunLock(run_directory_of(path)).acquire()
        try:
            run: Any = Run.open(path, cls.kind)
            last: Path = run.directory / LAST_CHECKPOINT
            files = [*run.checkpoints, *([last] if last.is_file() else [])]
            checkpoint = path if path.is_file() else newest(files)
            step = has_optimizer_and_step(checkpoint)[1] if checkpoint else 0
        except BaseException:
            if lock:
                lock.release()
            raise
        return cls(run.directory, run.manifest, checkpoint, step, lock)

    def acquire(self) -> RunLock:
        """Takes the lock of the run, unless that is done. Raises UsageError if another process
        writes it, or has written it since it was found."""
        if self.lock is None or self.lock.released:
            lock = RunLock(self.directory).acquire()
            if read_manifest(self.directory, self.kind) != self.manifest:
                lock.release()
                raise UsageError(f"{self.directory}: another process has written it just now")
            self.lock = lock
        return self.lock

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Frees the run, if the training that it was found for has not done so."""
        if self.lock:
            self.lock.release()

    def differences(self, config: ConfigT) -> list[str]:
        """Returns `key is x, the run has y` for every setting that differs and must not."""
        return differences(self.config, config, self.ignored_on_resume)

    @abstractmethod
    def changed_inputs(self, config: ConfigT, manifest: ManifestT) -> list[str]:
        """Returns every difference of data and weights between the run and the `manifest` of the
        training that would resume it, each as the end of a sentence."""

    def is_finished(self, config: ConfigT) -> bool:
        """Returns whether this is the end of a successful run, which `config` would only repeat."""
        manifest = self.manifest
        ended = manifest.status == "success" and self.step >= manifest.last_step
        return ended and not self.differences(config)

    def check(self, config: ConfigT, manifest: ManifestT | None = None) -> None:
        """Raises UsageError naming every setting of `config` that differs from the run's and, once
        the inputs are read and recorded in a `manifest`, every input that differs; other hardware
        is only warned of."""
        problems = self.differences(config)
        if manifest:
            problems += self.changed_inputs(config, manifest)
        if problems:
            raise UsageError(*(f"{self.directory} cannot resume: {one}" for one in problems))
        if manifest and other_hardware(self.config, config):
            log.warning("resuming on other hardware: equal to an unbroken run up to rounding only")

    def continue_manifest(self, manifest: ManifestT) -> None:
        """Copies into the resuming run's manifest what is recorded of the steps already done."""
        manifest.started = self.manifest.started
        manifest.resumed_from = [*self.manifest.resumed_from, self.step]
        manifest.trial = self.manifest.trial

    def restore(self, trainer: Any, module: ResumableModule) -> None:
        """Sets module, trainer and callbacks to the checkpoint's step, before `fit`, and deletes
        the checkpoints of later steps. Raises DataError if the tensors are not the module's."""
        if self.checkpoint:
            # Cloned, because the run will replace the very file that is memory-mapped.
            document: dict[str, Any] = tree_map_only(
                Tensor, torch.clone, load_weights_only(self.checkpoint)
            )
            try:
                restore_weights(module, document)
                module.completed_steps = int(document["global_step"])
                module.resumed_optimizer = optimizer_state(document)
                _restore_trainer(trainer, document)
            except LoragenError:
                raise
            except Exception as error:  # a damaged document may raise anything
                raise DataError(
                    f"{self.checkpoint}: not a checkpoint of this training: {one_line(error)}"
                ) from error
        if trainer.is_global_zero:
            self.delete_later_checkpoints()

    def delete_later_checkpoints(self) -> None:
        """Deletes the checkpoints of steps that will be done again: if the run is killed a second
        time, it must not find them without their metrics."""
        for file in self.checkpoints:
            # A copy that the user has put beside them has another name.
            names = BEST_CHECKPOINT, checkpoint_name(checkpoint_step(file))
            ours = file != self.checkpoint and any(map(file.match, names))
            if ours and _step_of(file) > self.step:
                file.unlink()
        if self.checkpoint is None or self.checkpoint.name != LAST_CHECKPOINT.name:
            (self.directory / LAST_CHECKPOINT).unlink(missing_ok=True)


def newest(files: Sequence[Path]) -> Path | None:
    """Returns the checkpoint of the highest step among those that carry the optimizer's state, or
    the highest of all if none does.

    The files are opened from the end until two could be read, in general last.ckpt and the newest
    one that is kept. Raises DataError if there are files and none can be read.
    """
    ranked: list[tuple[bool, int, Path]] = []
    for file in reversed(files):
        try:
            ranked.append((*has_optimizer_and_step(file), file))
        except DataError as error:
            if file == files[0] and not ranked:
                raise
            log.warning("%s; looking for an older one", error)
        if len(ranked) == 2:
            break
    return max(ranked)[2] if ranked else None


def has_optimizer_and_step(file: Path) -> tuple[bool, int]:
    """Returns whether a checkpoint carries the optimizer's state, and its step."""
    document = load_weights_only(file)
    step = document.get("global_step")
    if type(step) is not int:
        raise DataError(f"{file}: its step is missing (global_step); training cannot resume")
    return bool(document.get("optimizer_states")), step


def _step_of(file: Path) -> int:
    """Returns the step in a checkpoint's name, else in the file; 0 if that cannot be read."""
    if "step-" in file.stem:
        return checkpoint_step(file)
    try:
        return has_optimizer_and_step(file)[1]
    except DataError:
        return 0


def restore_weights(module: LightningModule, document: Mapping[str, Any]) -> None:
    """Loads a checkpoint's tensors. Raises DataError if they are not exactly the module's."""
    state = document.get("state_dict", {})
    try:
        if state.keys() != module.state_dict().keys():
            raise RuntimeError("other keys")
        module.load_state_dict(state, strict=False)  # LoraModule's state leaves out the base
    except RuntimeError as error:
        raise DataError("the checkpoint's tensors are not those of this training") from error


def _restore_trainer(trainer: Any, document: Mapping[str, Any]) -> None:
    """Sets the counters of a Lightning trainer, and its callbacks, to the checkpoint's step.

    Lightning's own restart (`ckpt_path`) counts from inside a step and an epoch, and loads its data
    loaders' state; ours is always between two steps, and batches need no state. Lightning's
    counters are therefore written here, and nowhere else.
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
    """Returns the optimizer's state, on the CPU; None, with a warning, if there is none."""
    states = document.get("optimizer_states") or []
    if not states:
        log.warning(
            "the checkpoint has no optimizer state: the optimizer starts with empty moments, and "
            "the steps will not be exactly those of an unbroken run"
        )
        return None
    return dict(states[0])
