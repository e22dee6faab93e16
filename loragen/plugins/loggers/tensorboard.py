"""TensorBoard event files, for `tensorboard --logdir <run directory>`."""

from __future__ import annotations

from contextlib import suppress
from functools import wraps
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field

from loragen.core.protocols import RunInfo, Status

if TYPE_CHECKING:
    from lightning.pytorch.loggers import TensorBoardLogger

DIRECTORY = "tensorboard_logs"


class TensorBoard:
    """Writes event files into `<run directory>/tensorboard_logs/`. Needs no service.

    A resumed run adds another event file beside the first; TensorBoard reads them as one, without
    the points that the first logged beyond the step the second went on from.
    """

    class Config(BaseModel, extra="forbid"):
        flush_secs: int = Field(
            10, ge=1, description="Points reach the disk after at most so long (seconds)."
        )

    def __init__(self, config: Config) -> None:
        self.config = config
        self._logger: TensorBoardLogger | None = None

    def open(self, run: RunInfo) -> TensorBoardLogger:
        from lightning.pytorch.loggers import TensorBoardLogger

        _let_the_writer_die_quietly()
        self._logger = TensorBoardLogger(
            save_dir=run.directory / DIRECTORY,
            name="",  # with the empty version: straight into the directory, no lightning_logs/
            version="",
            default_hp_metric=False,
            flush_secs=self.config.flush_secs,
            purge_step=run.resume_step + 1 if run.resume_step else None,
        )
        return self._logger

    @property
    def run_id(self) -> str | None:
        return None  # a directory of files; there is no service to know it by an id

    def close(self, status: Status) -> None:
        if self._logger is not None:
            self._logger.finalize(status)


def _let_the_writer_die_quietly() -> None:
    """What TensorBoard's thread cannot write is raised at the next point, where it is handled; the
    traceback that the thread prints besides says nothing more."""
    from tensorboard.summary.writer import event_file_writer  # type: ignore[import-untyped]

    thread: Any = getattr(event_file_writer, "_AsyncWriterThread", None)
    if thread is None or hasattr(thread.run, "__wrapped__"):  # done already
        return
    run = thread.run

    @wraps(run)
    def quiet(self: Any) -> None:
        with suppress(Exception):
            run(self)

    thread.run = quiet
