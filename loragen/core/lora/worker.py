"""A process that trains one dataset: `python -m loragen.core.lora.worker JOB.json STATUS.jsonl`.

The parent writes the job. The worker appends to the status file whatever happens, one JSON object a
line, which the parent reads as the file grows.
"""

import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict

from loragen.core.config import LoraTrainConfig
from loragen.core.data.dataset import Dataset
from loragen.core.data.documents import parsed_source
from loragen.core.errors import Interrupted, LoragenError, one_line
from loragen.core.progress import Silent, Step

Text = Annotated[str, BeforeValidator(lambda text: text.encode(errors="backslashreplace").decode())]
"""A text that UTF-8 can encode: a file name of another encoding may be part of a message."""


class TrainingJob(BaseModel):
    """A training, as the parent sends it to a worker."""

    config: LoraTrainConfig
    name: str
    location: str
    """The location of the dataset: an absolute path or a hub id."""
    resume: Path | None = None
    """The run directory to resume."""


class JobResult(BaseModel):
    """The end of a job."""

    status: Literal["trained", "failed", "interrupted"]
    reason: Text = ""
    traceback: Text = ""
    """The traceback of an error that is not the user's; after it another attempt may succeed."""


class WorkerReport(BaseModel):
    """One line of the status file. The first line, with nothing in it, says that the worker has
    started."""

    model_config = ConfigDict(ser_json_inf_nan="constants")  # a loss may be NaN

    directory: Path | None = None
    """The run directory, as soon as it has its manifest."""
    step: Step | None = None
    warning: Text = ""
    result: JobResult | None = None


class StatusFile:
    """A file to which the worker appends reports, and from which the parent reads them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._position = 0

    def append(self, report: WorkerReport) -> None:
        """Appends a line. The file is closed every time, so that other machines see the line. A
        full disk loses the line; it stops no training."""
        with suppress(OSError), self.path.open("ab") as file:
            file.write(report.model_dump_json(exclude_none=True).encode() + b"\n")

    def new_reports(self) -> Iterator[WorkerReport]:
        """Yields the complete lines since the last call."""
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            file.seek(self._position)
            for line in file:
                if not line.endswith(b"\n"):  # being written
                    return
                self._position += len(line)
                yield WorkerReport.model_validate_json(line)


class _Reporter(Silent, logging.Handler):
    """Reports the steps of the training and the warnings of this process."""

    def __init__(self, status: StatusFile) -> None:
        logging.Handler.__init__(self, logging.WARNING)
        self._status = status

    def step(self, step: Step) -> None:
        self._status.append(WorkerReport(step=step))

    def emit(self, record: logging.LogRecord) -> None:
        self._status.append(WorkerReport(warning=record.getMessage()))


def run_job(job: TrainingJob, status_file: Path) -> None:
    """Trains, and reports to `status_file`. It raises nothing; the last report has the result."""
    status = StatusFile(status_file)
    status.append(WorkerReport())
    reporter, logger, directory = _Reporter(status), logging.getLogger("loragen"), None
    logger.addHandler(reporter)
    try:
        from loragen.core.base.load import load_training_base
        from loragen.core.lora.train import LoraPoint, load_resumed_base, train_adapter

        found = LoraPoint.find(job.resume, to_write=True) if job.resume else nullcontext()
        with found as point:
            base = load_resumed_base(point, job.config) if point else load_training_base(job.config)
            run = train_adapter(
                job.config,
                Dataset(parsed_source(job.location), job.name),
                base,
                reporter,
                point,
                on_start=lambda directory: status.append(WorkerReport(directory=directory)),
            )
        result, directory = JobResult(status="trained"), run.directory
    except KeyboardInterrupt:
        result = JobResult(status="interrupted", reason="interrupted")
    except Interrupted as error:
        result = JobResult(status="interrupted", reason=one_line(error))
    except LoragenError as error:
        result = JobResult(status="failed", reason=one_line(error))
    except Exception as error:  # noqa: BLE001  # the parent reports it in one line
        trace = "".join(traceback.format_exception(error))
        reason = shorten(one_line(error), 300)
        result = JobResult(status="failed", reason=reason, traceback=trace)
    finally:
        logger.removeHandler(reporter)
    status.append(WorkerReport(directory=directory, result=result))


if __name__ == "__main__":
    job_file, report_file = map(Path, sys.argv[1:])
    # Lightning runs this command again for each further device; only the first process reports.
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    run_job(
        TrainingJob.model_validate_json(job_file.read_text(encoding="utf-8")),
        report_file if first else Path(os.devnull),
    )
