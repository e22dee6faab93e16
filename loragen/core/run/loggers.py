"""The loggers of one run, and metrics.jsonl, which every run writes even if all loggers fail.

Lightning's Trainer does not get them: it needs no logger, and an error in one would stop training.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loragen.core.errors import LoragenError, UsageError, WriteError
from loragen.core.files import write_errors, written_atomically
from loragen.core.plugins import create
from loragen.core.protocols import RunInfo, RunLogger, Status
from loragen.core.run.metrics import METRICS, metric_entries

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

log = logging.getLogger(__name__)


class StepLog:
    """A file of JSON lines, each an object with a `step`.

    A run that resumes after `resume_step` drops the lines of later steps.
    """

    def __init__(self, file: Path, resume_step: int = 0) -> None:
        self.file = file
        if file.exists():
            entries = metric_entries(file.read_bytes())
            kept = [line + b"\n" for line, entry in entries if entry["step"] <= resume_step]
            with written_atomically(file) as temporary:
                temporary.write_bytes(b"".join(kept))

        self.pending = b""
        """Lines that could not be written yet, because the disk is full."""

    def append(self, entry: Mapping[str, Any]) -> None:
        """Writes one line. After a WriteError, the next call or `flush` writes it."""
        self.pending += (json.dumps(entry) + "\n").encode()
        self.flush()

    def flush(self) -> None:
        """Writes the pending lines, all of them or none. Raises WriteError."""
        if not self.pending:
            return
        self.file.parent.mkdir(exist_ok=True)
        # Closed every time, so that a kill loses nothing.
        with write_errors(self.file), self.file.open("ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            try:
                if file.write(self.pending) != len(self.pending):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(size)
                raise
        self.pending = b""


class MetricsLog(StepLog):
    """The log of metrics such as `train/loss`."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Logs metrics; a value that is not finite becomes null, because JSON cannot write it."""
        values = {name: value if isfinite(value) else None for name, value in metrics.items()}
        told = bool(self.pending)
        try:
            self.append({"step": step, **values})
        except WriteError as error:
            if not told:
                log.warning("%s; it is tried again at every step", error)


class RunLoggers:
    """The loggers of the configuration's `loggers` section, and metrics.jsonl. For process 0 only.

    `resume_ids` and `resume_step` are the `run_ids` and the steps of a run that resumes. A
    UsageError of a logger is the user's mistake and is raised, by the constructor or `open`; any
    other exception costs one warning, and that logger is not called again.
    """

    def __init__(
        self,
        loggers: Mapping[str, Mapping[str, Any]],
        resume_ids: Mapping[str, str] | None = None,
        resume_step: int = 0,
    ) -> None:
        self.run_ids: dict[str, str] = {}
        """The ids of the loggers that have one, from `open` on."""
        self._resume_ids, self._resume_step = resume_ids or {}, resume_step
        self._plugins: dict[str, RunLogger] = {}
        self._open: dict[str, Logger | MetricsLog] = {}
        for name, options in loggers.items():
            with self._guarded(name, unless=UsageError):
                self._plugins[name] = create("logger", name, options)

    def open(self, run: RunInfo) -> None:
        """Opens the loggers for a run. Raises UsageError of a logger."""
        run = replace(run, resume_step=self._resume_step)
        with self._guarded(METRICS):
            self._open[METRICS] = MetricsLog(run.directory / METRICS, self._resume_step)
        for name, plugin in self._plugins.items():
            with self._guarded(name, unless=UsageError):
                self._open[name] = plugin.open(replace(run, resume_id=self._resume_ids.get(name)))
                if plugin.run_id is not None:
                    self.run_ids[name] = str(plugin.run_id)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Logs to every logger at the optimizer step `step`, counted from 1."""
        for name, logger in list(self._open.items()):
            with self._guarded(name):
                logger.log_metrics(dict(metrics), step=step)

    def flush(self) -> None:
        """Raises WriteError if metrics.jsonl lacks metrics of steps that were done."""
        metrics = self._open.get(METRICS)
        if isinstance(metrics, MetricsLog):
            metrics.flush()

    def close(self, status: Status) -> None:
        """Closes first Lightning's logger, then the plugin, which gets the status."""
        for name, plugin in self._plugins.items():
            logger = self._open.get(name)
            if logger is not None and not isinstance(logger, MetricsLog):
                with self._guarded(name):
                    logger.finalize("success" if status == "success" else "failed")
                    plugin.close(status)
        self._open.clear()

    @contextmanager
    def _guarded(self, name: str, unless: type[Exception] | tuple[()] = ()) -> Iterator[None]:
        """Drops the logger, with a warning, if the block fails."""
        try:
            yield
        except unless:
            raise
        except Exception as error:  # noqa: BLE001  # a logger may raise anything
            self._open.pop(name, None)
            log.warning(
                "logger '%s' failed and is left out: %s; training goes on", name, _reason(error)
            )


def _reason(error: BaseException) -> str:
    """Returns an error and its cause in one line: some libraries only guess at the cause."""
    text = str(error) if isinstance(error, LoragenError) else f"{type(error).__name__}: {error}"
    cause = error.__cause__
    if cause is not None and str(cause) not in text:
        text = f"{text} ({_reason(cause)})"
    return " ".join(text.split()).removesuffix(":")
