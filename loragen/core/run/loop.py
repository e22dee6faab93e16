"""The parts of the training loop that all trainings share: the session of the run, seeds,
interruption, checkpoints and divergence."""

import logging
import os
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from math import isfinite
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, Protocol, Self

import psutil
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from loragen.core.base.load import quiet_libraries
from loragen.core.config import dump
from loragen.core.errors import Interrupted, LoragenError, UsageError, WriteError, first_line
from loragen.core.files import remove_unfinished, write_text
from loragen.core.progress import Progress, Step, Validation
from loragen.core.protocols import RunInfo, Status
from loragen.core.run.directory import (
    CHECKPOINTS,
    CONFIG,
    LAST_CHECKPOINT,
    Manifest,
    TrialRecord,
    create_run_directory,
    write_manifest,
)
from loragen.core.run.lock import RunLock
from loragen.core.run.loggers import RunLoggers
from loragen.core.run.resume import ResumePoint

log = logging.getLogger(__name__)

HANGUP = getattr(signal, "SIGHUP", None)
"""The terminal, or the connection to it, was closed. Windows has no such signal."""
SIGNALS = tuple(number for number in (signal.SIGINT, signal.SIGTERM, HANGUP) if number is not None)
HARDWARE_EVERY = 10
"""Steps between two readings of the sensors, each of which costs about a millisecond."""


def make_trainer(options: Mapping[str, Any], **ours: Any) -> Trainer:
    """Returns a Lightning trainer that writes, prints and samples nothing on its own.

    Raises UsageError if this machine cannot do what the options ask for.
    """
    quiet_libraries()
    defaults = {
        "max_epochs": -1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
    }
    given = {key: value for key, value in options.items() if value is not None}
    try:
        return Trainer(**{**defaults, **given, **ours})
    except (MisconfigurationException, ImportError, ValueError, RuntimeError) as error:
        raise UsageError(f"trainer: {first_line(error)}") from error


def fit(trainer: Trainer, module: LightningModule, data: Any) -> None:
    """Runs `trainer.fit` and leaves the libraries' random state as it was.

    Lightning answers Ctrl+C with `exit(1)`; here it raises KeyboardInterrupt again.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            trainer.fit(module, datamodule=data)
    except MisconfigurationException as error:
        raise UsageError(f"trainer: {first_line(error)}") from error
    except SystemExit:
        raise KeyboardInterrupt from None


class Trial(Protocol):
    """The trial of a sweep that a run is, as its training sees it. Process 0 alone calls it."""

    record: TrialRecord
    """What the manifest says of it."""

    def started(self, directory: Path) -> None:
        """The run has its directory."""

    def validated(self, metrics: Mapping[str, float], step: int, is_last: bool) -> None:
        """A step was validated. Raises Interrupted if the training is not worth to go on."""


class RunSession(Callback):
    """One training run: its directory, loggers and manifest, from the first step to the status.

    It is a Lightning callback: in `setup` process 0 makes the directory, whose name every process
    then knows as `directory`. It is also the context manager of the block that trains and writes
    the results: with the block it closes, with the block's status.
    """

    directory: Path

    def __init__(
        self,
        parent: Path,
        prefix: str,
        name: str,
        config: Any,
        manifest: Manifest,
        progress: Progress,
        resume: ResumePoint[Any, Any] | None = None,
        trial: Trial | None = None,
    ) -> None:
        """`name` is that of the events sent to `progress`. What a resumed run has recorded of its
        steps is copied into `manifest`."""
        self._parent, self._prefix, self._name = parent, prefix, name
        self._config, self._resume = config, resume
        if resume:
            resume.continue_manifest(manifest)
            self._loggers = RunLoggers(config.loggers, resume.manifest.logger_run_ids, resume.step)
        else:
            self._loggers = RunLoggers(config.loggers)
        self._trainer: Trainer | None = None
        self._lock: RunLock | None = None
        before = (resume.manifest.seconds or 0.0) if resume else 0.0
        self._started = time.monotonic() - before
        self.manifest = manifest
        self.progress = progress
        self._trial = trial
        if trial:
            manifest.trial = trial.record

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._trainer = trainer
        name = ""
        if trainer.is_global_zero and self._resume:
            self._lock = self._resume.acquire()
            remove_unfinished(self._resume.directory)
            name = str(self._resume.directory)
        elif trainer.is_global_zero:
            directory = create_run_directory(self._parent, self._prefix)
            self._lock = RunLock(directory).acquire()
            name = str(directory)
        self.directory = Path(trainer.strategy.broadcast(name))
        (self.directory / CHECKPOINTS).mkdir(exist_ok=True)
        if trainer.is_global_zero:
            # First the files by which a run that is killed can be resumed: a logger may take
            # seconds to open.
            write_text(self.directory / CONFIG, dump(self._config))
            write_manifest(self.directory, self.manifest)
            if self._trial:
                self._trial.started(self.directory)
            self._loggers.open(
                RunInfo(
                    directory=self.directory,
                    name=self.directory.name,
                    project=f"loragen-{self.manifest.kind}",
                    config=self._config.model_dump(mode="json"),
                )
            )
            before = self._resume.manifest.logger_run_ids if self._resume else {}
            self.manifest.logger_run_ids = {**before, **self._loggers.run_ids}
            write_manifest(self.directory, self.manifest)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Logs to every logger at the optimizer step `step`, counted from 1."""
        assert self._trainer is not None
        if self._trainer.is_global_zero:
            extra = hardware_usage() if step % HARDWARE_EVERY == 1 else {}
            self._loggers.log_metrics({**metrics, **extra}, step)
            if self._trial and any(name.startswith("val") for name in metrics):
                is_last = step >= self._trainer.max_steps
                self._trial.validated(metrics, step, is_last)

    def report(self, event: Step | Validation) -> None:
        """Shows a step or a validation in the progress, under the session's name."""
        assert self._trainer is not None
        if not self._trainer.is_global_zero:
            return
        if isinstance(event, Step):
            self.progress.step(replace(event, name=self._name))
        else:
            self.progress.validated(replace(event, name=self._name))

    def check(self) -> None:
        """Raises LoragenError if another process has taken the run, and WriteError if metrics of
        steps that are about to be saved could not be written."""
        if self._lock:
            self._lock.check()
        self._loggers.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Closes the loggers, writes the final manifest and frees the run, unless `setup` was never
        reached."""
        stopped = kind is not None and issubclass(kind, KeyboardInterrupt | Interrupted)
        status: Status = "success" if kind is None else "interrupted" if stopped else "failed"
        self.progress.training_ended(self._name)
        try:
            if self._trainer is None or not hasattr(self, "directory"):
                return
            self._loggers.close(status)
            self.manifest.status = status
            self.manifest.seconds = round(time.monotonic() - self._started, 2)
            if self._lock and self._lock.is_ours():  # in process 0
                try:
                    write_manifest(self.directory, self.manifest)
                except WriteError as error:  # to resume, it needs no status
                    if kind is None:
                        raise
                    log.warning("%s", error)
        finally:
            if self._lock:
                self._lock.release()


def hardware_usage() -> dict[str, float]:
    """Returns the metrics `hardware/*`: use (%) and memory (GiB) of the CPU and, if there is one,
    of the current GPU."""
    process = psutil.Process(os.getpid())
    usage = {
        "hardware/cpu_percent": psutil.cpu_percent(),
        "hardware/memory_gib": process.memory_info().rss / 2**30,
        "hardware/memory_percent": psutil.virtual_memory().percent,
    }
    if torch.cuda.is_available():
        usage["hardware/gpu_memory_gib"] = torch.cuda.memory_reserved() / 2**30
        with suppress(Exception):  # the sensor library is optional, and a MIG slice has no sensor
            usage["hardware/gpu_percent"] = float(torch.cuda.utilization())
    return usage


class Interruption:
    """Remembers Ctrl+C, a scheduler's SIGTERM, or SIGHUP of a terminal that is closed, until the
    step is finished and saved. A second signal raises KeyboardInterrupt at once, but for SIGHUP,
    which the shell and the terminal may both send. Under `nohup` SIGHUP stays ignored."""

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Handles the signals within the block. Only the main thread receives signals; in any other
        nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        self.install_handlers()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def install_handlers(self) -> None:
        """Installs the handlers. This is called again when training begins, because Lightning sets
        a handler of SIGTERM that would end it between two accumulation rounds."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number != HANGUP or signal.getsignal(number) != signal.SIG_IGN:
                    signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number != HANGUP:
            raise KeyboardInterrupt
        self.requested = True

    def requested_on_any(self, trainer: Any) -> bool:
        """Returns whether any process was interrupted. The processes decide together, because the
        others would wait for one that stopped alone."""
        if trainer.world_size == 1:
            return self.requested
        return bool(trainer.strategy.reduce_boolean_decision(self.requested, all=False))


class StepSeeds(Callback):
    """Makes dropout and noise a pure function of (seed, micro-batch, process), as batches are."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        rounds = trainer.accumulate_grad_batches
        k = trainer.global_step * rounds + batch_idx % rounds
        torch.manual_seed((self.seed * 1_000_003 + k) * 4099 + trainer.global_rank)


class StepCallback(Callback, ABC):
    """Calls `on_step` once per optimizer step: with accumulation, several batches make a step."""

    _done = 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._done = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > self._done:
            self._done = trainer.global_step
            self.on_step(trainer, pl_module, batch)

    @abstractmethod
    def on_step(self, trainer: Trainer, pl_module: Any, batch: Any) -> None: ...


class CheckpointCallback(StepCallback):
    """Saves checkpoints and, in between, last.ckpt; an interruption ends the training after a step
    that is saved. A subclass decides which steps it keeps, and calls `end_step` after each."""

    command: ClassVar[str]
    """The command that resumes such a run."""

    def __init__(self, session: RunSession, interruption: Interruption, last_every: int) -> None:
        """last.ckpt is renewed every `last_every` optimizer steps."""
        self.session, self.interruption, self.last_every = session, interruption, last_every

    @property
    def last_file(self) -> Path:
        return self.session.directory / LAST_CHECKPOINT

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        self.interruption.install_handlers()

    def save(self, trainer: Trainer, file: Path) -> None:
        """Saves the current step to `file`. Raises LoragenError if a weight is not finite, or
        another process has taken the run."""
        self.session.check()
        state = trainer.lightning_module.state_dict()
        # One flag of each weight, which are read together: reading one waits for the GPU.
        finite = torch.stack([weight.isfinite().all() for weight in state.values()]).tolist()
        if not all(finite):  # a bad checkpoint must not replace a good one
            name = list(state)[finite.index(False)]
            raise _diverged(f"{name} is not finite", trainer.global_step, self.session.directory)
        # Called in all processes, because it has a barrier. Lightning's `weights_only` would leave
        # out the states of optimizer and callbacks.
        trainer.save_checkpoint(file, weights_only=False)

    @abstractmethod
    def save_last(self, trainer: Trainer) -> None:
        """Renews last.ckpt."""

    def end_step(self, trainer: Trainer, is_saved: bool, can_stop: bool = True) -> None:
        """Renews last.ckpt if it is due, unless the step `is_saved` already, so that the run can
        resume from it. Raises Interrupted if the run was interrupted and `can_stop`."""
        step, stops = trainer.global_step, self.interruption.requested_on_any(trainer) and can_stop
        if (stops or step % self.last_every == 0) and not is_saved:
            self.save_last(trainer)
        if stops:
            raise Interrupted(
                f"interrupted after step {step} of {trainer.max_steps}, which is saved; to resume: "
                f"loragen {self.command} --resume {self.session.directory}"
            )


def step_schedule(optimizer: Optimizer, rate: Callable[[int], float], done: int = 0) -> LambdaLR:
    """Returns the schedule of `rate(step)`, with steps counted from 1, for an optimizer that has
    `done` some steps already; the `factor` of a parameter group multiplies its rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = group.get("factor", 1.0)
    return LambdaLR(optimizer, lambda steps: rate(steps + 1), last_epoch=done - 1)


def check_loss(name: str, value: float, step: int, run: Path) -> None:
    """Raises LoragenError if the loss of a step, counted from 1, is not finite."""
    if not isfinite(value) and step <= 1 and name.startswith("train/"):
        raise LoragenError(
            f"{run}: {name} is {value} before the first update, so that no learning rate is the "
            "cause: the base overflows in its dtype (try base_dtype: float32, and a trainer."
            "precision that is not 16-mixed)"
        )
    if not isfinite(value):
        raise _diverged(f"{name} is {value}", step, run)


def _diverged(what: str, step: int, run: Path) -> LoragenError:
    return LoragenError(
        f"{run}: the training has diverged: {what} at step {step}; try a lower learning rate or "
        "trainer.gradient_clip_val=1.0 (earlier checkpoints are kept)"
    )
