"""The loggers of one run. One that fails is left out with a warning; training goes on.

Lightning's Trainer is given none of them: nothing in there needs one, and whatever it calls on its
loggers could stop training.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from loragen.core.errors import LoragenError, UsageError
from loragen.core.metrics_log import METRICS, MetricsLog
from loragen.core.plugins import create
from loragen.core.protocols import RunInfo, RunLogger, Status

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

NO_IDS: Mapping[str, str] = MappingProxyType({})

log = logging.getLogger(__name__)


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
