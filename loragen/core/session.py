"""One training run: its directory, its loggers, its manifest, from the first step to the status.

A Lightning callback, because the directory's name has to reach every rank: rank 0 makes it, the
others are told.
"""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer

from loragen.core.config import dump
from loragen.core.errors import UsageError
from loragen.core.files import remove_unfinished, write_text
from loragen.core.interrupt import Interrupted
from loragen.core.manifests import Manifest, write_manifest
from loragen.core.progress import Progress, Step, Validation
from loragen.core.protocols import RunInfo, Status
from loragen.core.run_loggers import RunLoggers
from loragen.core.runs import CHECKPOINTS, CONFIG, create_run_directory

HARDWARE_EVERY = 10  # steps; reading the sensors costs about a millisecond


@dataclass(frozen=True)
class Continued:
    """The run that a session goes on with, in place of a new one."""

    directory: Path
    step: int
    """Optimizer steps done."""
    logger_run_ids: Mapping[str, str]
    seconds: float
    """What it has taken so far."""


class RunSession(Callback):
    """Opens in `setup`, closes with `close`. `directory` is known from `setup` on."""

    directory: Path

    def __init__(
        self,
        parent: Path,
        prefix: str,
        config: Any,
        manifest: Manifest,
        progress: Progress,
        continued: Continued | None = None,
    ) -> None:
        self._parent, self._prefix = parent, prefix
        self._config, self._continued = config, continued
        self._loggers = (
            RunLoggers(config.loggers, continued.logger_run_ids, continued.step)
            if continued
            else RunLoggers(config.loggers)
        )
        self._trainer: Trainer | None = None
        self._started = time.monotonic() - (continued.seconds if continued else 0.0)
        self.manifest = manifest
        self.progress = progress

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._trainer = trainer
        made = self._made() if trainer.is_global_zero else ""
        self.directory = Path(trainer.strategy.broadcast(made))
        (self.directory / CHECKPOINTS).mkdir(exist_ok=True)
        if trainer.is_global_zero:
            # First what a run killed from here on is known by: a logger may take seconds to open.
            write_text(self.directory / CONFIG, dump(self._config))
            write_manifest(self.directory, self.manifest)
            self._loggers.open(self._info())
            before = self._continued.logger_run_ids if self._continued else {}
            self.manifest.logger_run_ids = {**before, **self._loggers.run_ids}
            write_manifest(self.directory, self.manifest)

    def _made(self) -> str:
        if self._continued is None:
            return str(create_run_directory(self._parent, self._prefix))
        remove_unfinished(self._continued.directory)
        return str(self._continued.directory)

    def _info(self) -> RunInfo:
        return RunInfo(
            directory=self.directory,
            name=self.directory.name,
            project=f"loragen-{self.manifest.model_dump()['kind']}",
            config=self._config.model_dump(mode="json"),
        )

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """To every logger at the true step, counted from 1."""
        assert self._trainer is not None
        if self._trainer.is_global_zero:
            extra = hardware_usage() if step % HARDWARE_EVERY == 1 else {}
            self._loggers.log_metrics({**metrics, **extra}, step)

    def report(self, step: Step) -> None:
        assert self._trainer is not None
        if self._trainer.is_global_zero:
            self.progress.step(step)

    def report_validation(self, validation: Validation) -> None:
        assert self._trainer is not None
        if self._trainer.is_global_zero:
            self.progress.validated(validation)

    def close(self, status: Status) -> None:
        """Closes the loggers and writes the final manifest; nothing to do if never opened."""
        self.progress.stop()
        if self._trainer is None or not hasattr(self, "directory"):
            return
        self._loggers.close(status)
        self.manifest.status = status
        self.manifest.seconds = round(time.monotonic() - self._started, 2)
        if self._trainer.is_global_zero:
            write_manifest(self.directory, self.manifest)


@contextmanager
def outcome(session: RunSession) -> Iterator[None]:
    """Closes the session with how the block, training and writing the results, has ended."""
    try:
        yield
    except (KeyboardInterrupt, Interrupted):
        session.close("interrupted")
        raise
    except BaseException:
        session.close("failed")
        raise
    session.close("success")


def fit(trainer: Trainer, module: LightningModule, data: Any) -> None:
    """`trainer.fit`, which leaves the libraries' random state as it was.

    Lightning answers Ctrl+C with `exit(1)`; the caller gets the KeyboardInterrupt back.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            trainer.fit(module, datamodule=data)
    except MisconfigurationException as error:
        raise UsageError(f"trainer: {str(error).strip().splitlines()[0]}") from error
    except SystemExit:
        raise KeyboardInterrupt from None


def make_trainer(options: Mapping[str, Any], **ours: Any) -> Trainer:
    """A Lightning trainer that writes, prints and samples nothing on its own.

    Raises UsageError where it cannot have what the options ask of this machine.
    """
    from loragen.core.quiet import quiet_libraries

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
        raise UsageError(f"trainer: {str(error).strip().splitlines()[0]}") from error


def hardware_usage() -> dict[str, float]:
    """`hardware/*`: CPU use (%), memory (GiB), and of the current GPU, where there is one, use (%)
    and memory (GiB)."""
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
