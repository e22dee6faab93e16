"""One dataset of a collection in a process of its own: `python -m ... JOB.json RESULT.json`."""

import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from loragen.core.config import LoraTrainConfig
from loragen.core.data.documents import parsed_source
from loragen.core.errors import LoragenError, one_line
from loragen.core.files import write_text
from loragen.core.interrupt import Interrupted
from loragen.core.lora.collect import Outcome, Task
from loragen.core.manifests import LoraManifest, read_manifest
from loragen.core.progress import Silent
from loragen.core.runs import LoraRun

log = logging.getLogger(__name__)


class Job(BaseModel):
    """What the process is told."""

    config: LoraTrainConfig
    name: str
    source: str
    """As `data.documents.location` writes it."""
    resume: Path | None = None
    """The run to go on with."""


class Result(BaseModel):
    """What it tells."""

    status: Literal["trained", "failed", "interrupted"]
    directory: Path | None = None
    reason: str = ""
    traceback: str = ""
    """Of an error that is not the user's."""
    warnings: list[str] = []


def train_job(job: Job) -> Result:
    """Trains. What the user can mend, and an interruption, is told; any other error is raised."""
    warnings = _Warnings()
    logging.getLogger("loragen").addHandler(warnings)
    try:
        directory = _train(job)
    except Interrupted as error:
        return Result(status="interrupted", reason=one_line(error), warnings=warnings.lines)
    except LoragenError as error:
        return Result(status="failed", reason=one_line(error), warnings=warnings.lines)
    finally:
        logging.getLogger("loragen").removeHandler(warnings)
    return Result(status="trained", directory=directory, warnings=warnings.lines)


def outcome_of(task: Task, result: Result) -> Outcome:
    """The result as a collection tells it; its warnings are logged here."""
    for line in result.warnings:
        log.warning("%s: %s", task.name, line)
    if result.status == "interrupted":
        return Outcome(task, "interrupted", None, result.reason, Interrupted(result.reason))
    if result.status == "failed" or result.directory is None:
        error = LoragenError(result.reason)
        if result.traceback:
            error.add_note(result.traceback)  # `--debug` shows it
        return Outcome(task, "failed", None, result.reason, error)
    return Outcome(
        task,
        "trained",
        LoraRun(result.directory, read_manifest(result.directory, LoraManifest)),
    )


def _train(job: Job) -> Path:
    from loragen.core.lora.precision import load_training_base
    from loragen.core.lora.resume import find_resume_point, load_base_again
    from loragen.core.lora.train import train

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
    job = Job.model_validate_json(Path(job_file).read_text(encoding="utf-8"))
    try:
        result = train_job(job)
    except KeyboardInterrupt:
        result = Result(status="interrupted", reason="interrupted")
    except Exception as error:  # noqa: BLE001  # told in one line by whoever has started us
        trace = "".join(traceback.format_exception(error))
        result = Result(status="failed", reason=one_line(error), traceback=trace)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        write_text(Path(result_file), result.model_dump_json())


if __name__ == "__main__":
    main(*sys.argv[1:])
