"""One dataset of a collection in a process of its own: `python -m ... JOB.json RESULT.json`.

A run of another process, followed by the files in its directory.
"""

import logging
import os
import sys
import traceback
from math import nan
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from loragen.core.config import LoraTrainConfig
from loragen.core.data.documents import location, parsed_source
from loragen.core.errors import Interrupted, LoragenError, one_line
from loragen.core.files import write_text
from loragen.core.lora.tasks import Task, TaskOutcome, run_directories
from loragen.core.progress import Silent, Step
from loragen.core.run.directory import LoraManifest, LoraRun, read_manifest
from loragen.core.run.loggers import METRICS, metrics_after

log = logging.getLogger(__name__)


class TrainingJob(BaseModel):
    """What the process is told."""

    config: LoraTrainConfig
    name: str
    source: str
    """As `data.documents.location` writes it."""
    resume: Path | None = None
    """The run to go on with."""


class TrainingResult(BaseModel):
    """What it tells."""

    status: Literal["trained", "failed", "interrupted"]
    directory: Path | None = None
    reason: str = ""
    traceback: str = ""
    """Of an error that is not the user's."""
    warnings: list[str] = []


def train_job(job: TrainingJob) -> TrainingResult:
    """Trains. What the user can mend, and an interruption, is told; any other error is raised."""
    warnings = _Warnings()
    logging.getLogger("loragen").addHandler(warnings)
    try:
        directory = _train(job)
    except Interrupted as error:
        return TrainingResult(status="interrupted", reason=one_line(error), warnings=warnings.lines)
    except LoragenError as error:
        return TrainingResult(status="failed", reason=one_line(error), warnings=warnings.lines)
    finally:
        logging.getLogger("loragen").removeHandler(warnings)
    return TrainingResult(status="trained", directory=directory, warnings=warnings.lines)


def outcome_of(task: Task, result: TrainingResult) -> TaskOutcome:
    """The result as a collection tells it; its warnings are logged here."""
    for line in result.warnings:
        log.warning("%s: %s", task.name, line)
    if result.status == "interrupted":
        return TaskOutcome(task, "interrupted", None, result.reason, Interrupted(result.reason))
    if result.status == "failed" or result.directory is None:
        error = LoragenError(result.reason)
        if result.traceback:
            error.add_note(result.traceback)  # `--debug` shows it
        return TaskOutcome(task, "failed", None, result.reason, error)
    return TaskOutcome(
        task,
        "trained",
        LoraRun(result.directory, read_manifest(result.directory, LoraManifest)),
    )


def _train(job: TrainingJob) -> Path:
    from loragen.core.base.load import load_training_base
    from loragen.core.lora.train import find_resume_point, load_base_again, train

    point = find_resume_point(job.resume) if job.resume else None
    base = load_base_again(point, job.config) if point else load_training_base(job.config)
    return train(job.config, job.name, parsed_source(job.source), base, Silent(), point).directory


class _Warnings(logging.Handler):
    """Keeps what this process would have told a terminal."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def main(job_file: str, result_file: str) -> None:
    """Lightning runs this again for the other devices, whose results are the same."""
    job = TrainingJob.model_validate_json(Path(job_file).read_text(encoding="utf-8"))
    try:
        result = train_job(job)
    except KeyboardInterrupt:
        result = TrainingResult(status="interrupted", reason="interrupted")
    except Exception as error:  # noqa: BLE001  # told in one line by whoever has started us
        trace = "".join(traceback.format_exception(error))
        result = TrainingResult(status="failed", reason=one_line(error), traceback=trace)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        write_text(Path(result_file), result.model_dump_json())


if __name__ == "__main__":
    main(*sys.argv[1:])


class RunWatch:
    """Made before the process starts, to tell its run from those that are there."""

    def __init__(self, config: LoraTrainConfig, task: Task) -> None:
        self._config, self._task = config, task
        self._known = set(run_directories(config, task))
        self._directory: Path | None = None
        self._step = 0

    @property
    def directory(self) -> Path | None:
        """The run, once it is there."""
        if self._directory is None:
            found = (d for d in run_directories(self._config, self._task) if d not in self._known)
            self._directory = next(filter(self._is_ours, found), None)
        return self._directory

    def news(self) -> list[Step]:
        """The steps since the last call."""
        if self.directory is None:
            return []
        entries = metrics_after(self.directory / METRICS, self._step)
        total = self._config.training.max_steps
        steps = [
            Step(
                int(entry["step"]),
                total,
                int(entry["train/stage"]),
                entry["train/loss"],
                entry.get("train/tokens_per_second", nan),
                "answer tokens/s",
                name=self._task.name,
            )
            for entry in entries
            if "train/loss" in entry
        ]
        self._step = max([self._step, *(step.step for step in steps)])
        return steps

    def _is_ours(self, directory: Path) -> bool:
        try:
            manifest = read_manifest(directory, LoraManifest)
        except LoragenError:  # being written
            return False
        return manifest.dataset.path == location(self._task.source)
