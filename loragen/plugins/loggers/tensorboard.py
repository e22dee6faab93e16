"""TensorBoard event files, for `tensorboard --logdir <run directory>`."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from pydantic import BaseModel, Field

from loragen.core.protocols import RunInfo, Status

if TYPE_CHECKING:
    from lightning.pytorch.loggers import TensorBoardLogger

DIRECTORY = "tensorboard_logs"


class TensorBoard:
    """Writes event files into `<run directory>/tensorboard_logs/`. Needs no service.

    A resumed run adds an event file beside the first. TensorBoard reads both as one run and drops
    the points that the first file has after the step of the resumed checkpoint.
    """

    run_id: str | None = None  # there is no service

    class Config(BaseModel, extra="forbid"):
        flush_secs: int = Field(
            10, ge=1, description="Longest time until points are written to disk (seconds)."
        )

    def __init__(self, config: Config) -> None:
        self.config = config

    def open(self, run: RunInfo) -> TensorBoardLogger:
        from lightning.pytorch.loggers import TensorBoardLogger

        _silence_writer_threads()
        return TensorBoardLogger(
            save_dir=run.directory / DIRECTORY,
            name="",  # with an empty version, there is no subdirectory lightning_logs/version_0
            version="",
            default_hp_metric=False,
            flush_secs=self.config.flush_secs,
            purge_step=run.resume_step + 1 if run.resume_step else None,
        )

    def close(self, status: Status) -> None:
        """Does nothing: Lightning's `finalize` has closed the files."""


def _silence_writer_threads() -> None:
    """Suppresses the traceback that TensorBoard's writer thread prints if it cannot write; the
    error is raised again, and handled, when the next point is logged."""
    previous = threading.excepthook
    if previous.__module__ == __name__:
        return

    def hook(failure: threading.ExceptHookArgs) -> None:
        if not type(failure.thread).__module__.startswith("tensorboard."):
            previous(failure)

    threading.excepthook = hook
