"""A CSV file, for spreadsheets."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING

from pydantic import BaseModel, Field

from loragen.core.protocols import RunInfo, Status

if TYPE_CHECKING:
    from lightning.pytorch.loggers import CSVLogger


class Csv:
    """Writes `<run directory>/csv_logs/metrics.csv`: one row for each call, one column a metric.

    A resumed run keeps the rows up to the step of its checkpoint.
    """

    run_id: str | None = None  # there is no service

    class Config(BaseModel, extra="forbid"):
        flush_logs_every_n_steps: int = Field(
            1, ge=1, description="Steps between two writes to disk."
        )

    def __init__(self, config: Config) -> None:
        self.config = config

    def open(self, run: RunInfo) -> CSVLogger:
        from lightning.pytorch.loggers import CSVLogger

        directory = run.directory / "csv_logs"
        file, rows = directory / "metrics.csv", []
        if file.exists():
            with file.open(newline="", encoding="utf-8") as stream:
                rows = list(csv.DictReader(stream))
        for old in (file, directory / "hparams.yaml"):  # Lightning would, with a warning
            old.unlink(missing_ok=True)
        logger = CSVLogger(
            save_dir=directory,
            name="",  # with an empty version, there is no subdirectory lightning_logs/version_0
            version="",
            flush_logs_every_n_steps=self.config.flush_logs_every_n_steps,
        )
        for row in rows:
            step, values = row.pop("step", None), {k: v for k, v in row.items() if k and v}
            if step and step.isdecimal() and int(step) <= run.resume_step:
                logger.experiment.log_metrics(values, int(step))
        logger.save()
        return logger

    def close(self, status: Status) -> None:
        """Does nothing: Lightning's `finalize` has written the file."""
