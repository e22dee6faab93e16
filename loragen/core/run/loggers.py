"""The local log that every run keeps: one JSON object a line, whatever becomes of the loggers.

The loggers of one run. One that fails is left out with a warning; training goes on.

Lightning's Trainer is given none of them: nothing in there needs one, and whatever it calls on its
loggers could stop training.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from math import isfinite, nan
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from loragen.core.errors import LoragenError, UsageError
from loragen.core.files import written_atomically
from loragen.core.plugins import create
from loragen.core.protocols import RunInfo, RunLogger, Status

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"


class StepLog:
    """Appends to `file`, one JSON object with a `step` a line.

    A run that goes on after `resume_step` drops what was written of later steps.
    """

    def __init__(self, file: Path, resume_step: int = 0) -> None:
        self.file = file
        if file.exists():
            _cut_back(file, resume_step)

    def append(self, entry: Mapping[str, Any]) -> None:
        """One line, on the disk once this returns. Raises OSError."""
        self.file.parent.mkdir(exist_ok=True)
        with self.file.open("ab") as file:  # nothing stays open: a kill loses nothing
            file.write((json.dumps(entry) + "\n").encode())


class MetricsLog(StepLog):
    """The log of `train/loss` and its like."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """What is not finite becomes null: JSON has no word for it."""
        values = {name: value if isfinite(value) else None for name, value in metrics.items()}
        self.append({"step": step, **values})


def read_metrics(file: Path) -> list[dict[str, float]]:
    """The entries in the order they were logged, each with its `step`; null is nan again.

    The torn last line of a run that was killed, or is still going on, is left out.
    """
    return [
        {name: nan if value is None else value for name, value in entry.items()}
        for _, entry in _entries(file.read_bytes())
    ]


def metrics_after(file: Path, step: int, tail: int = 65536) -> list[dict[str, float]]:
    """The entries of later steps, out of the last `tail` bytes; none where there is no file."""
    if not file.is_file():
        return []
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - tail))
        content = opened.read()
    return [
        {name: nan if value is None else value for name, value in entry.items()}
        for _, entry in _entries(content)
        if entry["step"] > step
    ]


def _cut_back(file: Path, step: int) -> None:
    entries = _entries(file.read_bytes())
    kept = [line + b"\n" for line, entry in entries if entry["step"] <= step]
    with written_atomically(file) as temporary:
        temporary.write_bytes(b"".join(kept))


def _entries(content: bytes) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each line that is an entry, and what it says."""
    for line in content.split(b"\n"):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and type(entry.get("step")) is int:
            yield line, entry


NO_IDS: Mapping[str, str] = MappingProxyType({})


class RunLoggers:
    """What the configuration's `loggers` section names, and the local log. For rank 0 only.

    `resume_ids` and `resume_step` tell of the run that is continued: its `run_ids`, and the steps
    it has done. A UsageError of a logger is the user's mistake and raised, by the constructor or
    `open`; any other exception costs one warning, and that logger is not called again.
    """

    def __init__(
        self,
        loggers: Mapping[str, Mapping[str, Any]],
        resume_ids: Mapping[str, str] = NO_IDS,
        resume_step: int = 0,
    ) -> None:
        self.run_ids: dict[str, str] = {}
        """Of the loggers that have one, from `open` on."""
        self._resume_ids, self._resume_step = resume_ids, resume_step
        self._plugins: dict[str, RunLogger] = {}
        self._open: dict[str, Logger | MetricsLog] = {}
        for name, options in loggers.items():
            with self._left_out(name, unless=UsageError):
                self._plugins[name] = create("logger", name, options)

    def open(self, run: RunInfo) -> None:
        run = replace(run, resume_step=self._resume_step)
        with self._left_out(METRICS):
            self._open[METRICS] = MetricsLog(run.directory / METRICS, self._resume_step)
        for name, plugin in self._plugins.items():
            with self._left_out(name, unless=UsageError):
                self._open[name] = plugin.open(replace(run, resume_id=self._resume_ids.get(name)))
                if plugin.run_id is not None:
                    self.run_ids[name] = str(plugin.run_id)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """To each at the true step, counted from 1."""
        for name, logger in list(self._open.items()):
            with self._left_out(name):
                logger.log_metrics(dict(metrics), step=step)

    def close(self, status: Status) -> None:
        """First Lightning's own end of a logger, then the plugin's, which knows the status."""
        for name, plugin in self._plugins.items():
            logger = self._open.get(name)
            if logger is not None and not isinstance(logger, MetricsLog):
                with self._left_out(name):
                    logger.finalize("success" if status == "success" else "failed")
                    plugin.close(status)
        self._open.clear()

    @contextmanager
    def _left_out(self, name: str, unless: type[Exception] | tuple[()] = ()) -> Iterator[None]:
        """Leaves the logger out where the block fails."""
        try:
            yield
        except unless:
            raise
        except Exception as error:  # noqa: BLE001  # whatever a logger raises, training goes on
            self._open.pop(name, None)
            log.warning(
                "logger '%s' failed and is left out: %s; training goes on", name, _reason(error)
            )


def _reason(error: BaseException) -> str:
    """In one line, with what has caused it: some libraries guess in the message they raise."""
    text = str(error) if isinstance(error, LoragenError) else f"{type(error).__name__}: {error}"
    cause = error.__cause__
    if cause is not None and str(cause) not in text:
        text = f"{text} ({_reason(cause)})"
    return " ".join(text.split()).removesuffix(":")
