"""The datasets of a collection one after the other, on this machine."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from loragen.core.config import LoraTrainConfig
from loragen.core.data.documents import location
from loragen.core.errors import LoragenError
from loragen.core.interrupt import Interrupted, Interruption
from loragen.core.lora.collect import (
    CollectionProgress,
    Outcome,
    Task,
    config_of,
    failed,
    not_started,
)
from loragen.core.lora.precision import load_training_base
from loragen.core.lora.train import train
from loragen.core.lora.watch import RunWatch
from loragen.core.lora.worker import Job, Result, outcome_of
from loragen.core.progress import Step, Validation

POLL_SECONDS = 0.3
GRACE_SECONDS = 30
"""For a process that was told twice to stop."""


def wants_processes(config: LoraTrainConfig) -> bool:
    """Whether Lightning would start the processes of several devices itself.

    It does so by running the command again, once for all that is trained in it: after a dataset
    that failed, its children would wait for ever. So each dataset gets a process of its own.
    """
    if launched_outside():
        return False
    devices = config.trainer.devices
    if devices in ("auto", "-1", -1):
        return torch.cuda.device_count() > 1
    return devices not in (1, "1") or config.trainer.num_nodes > 1


def launched_outside() -> bool:
    """Whether torchrun or Slurm has started us, once per device."""
    return "LOCAL_RANK" in os.environ or bool(SLURMEnvironment.detect())


def train_here(
    config: LoraTrainConfig, tasks: Sequence[Task], progress: CollectionProgress
) -> Iterator[Outcome]:
    """In this process, on one base model. Raises LoragenError where that does not load."""
    base = load_training_base(config)
    for index, task in enumerate(tasks):
        try:
            own = config_of(config, task)
            run = train(own, task.name, task.source, base, _OfTask(progress, task))
        except (KeyboardInterrupt, Interrupted) as error:
            yield Outcome(task, "interrupted", None, str(error) or "interrupted", error)
            yield from not_started(tasks[index + 1 :])
            return
        except Exception as error:
            if launched_outside() and not isinstance(error, LoragenError):
                raise  # perhaps on this rank alone: the launcher has to stop the others
            yield failed(task, error)
        else:
            yield Outcome(task, "trained", run)


def train_in_processes(
    config: LoraTrainConfig, tasks: Sequence[Task], progress: CollectionProgress
) -> Iterator[Outcome]:
    """Each in a process of its own, from which Lightning starts those of the other devices."""
    interruption = Interruption()
    with interruption.awaited():
        for index, task in enumerate(tasks):
            progress.started(task, config.training.max_steps)
            job = Job(config=config_of(config, task), name=task.name, source=location(task.source))
            watch = RunWatch(config, task)
            outcome = outcome_of(task, _run(job, watch, progress, task, interruption))
            yield outcome
            if interruption.requested or outcome.status == "interrupted":
                yield from not_started(tasks[index + 1 :])
                return


def _run(
    job: Job, watch: RunWatch, progress: CollectionProgress, task: Task, interruption: Interruption
) -> Result:
    with tempfile.TemporaryDirectory(prefix="loragen-") as folder:
        job_file, result_file = Path(folder, "job.json"), Path(folder, "result.json")
        job_file.write_text(job.model_dump_json(), encoding="utf-8")
        module = "loragen.core.lora.worker"
        command = [sys.executable, "-m", module, str(job_file), str(result_file)]
        # In a session of its own, so that Ctrl+C reaches it once: through us. (Not on Windows,
        # where the console has told it already.)
        process = subprocess.Popen(command, start_new_session=True)
        try:
            told = sys.platform == "win32"
            while _running(process):
                for step in watch.news():
                    progress.step(task, step)
                if interruption.requested and not told:
                    process.terminate()
                    told = True
        finally:
            _end(process)
        if not result_file.is_file():
            return Result(status="failed", reason=f"its process ended with {process.returncode}")
        return Result.model_validate_json(result_file.read_text(encoding="utf-8"))


def _running(process: "subprocess.Popen[bytes]") -> bool:
    try:
        process.wait(POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return True
    return False


def _end(process: "subprocess.Popen[bytes]") -> None:
    """A process that is still there when we leave: the user has pressed Ctrl+C twice."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            if sys.platform == "win32":
                process.kill()
            else:  # with the processes of the other devices
                os.killpg(process.pid, signal.SIGKILL)


class _OfTask:
    """The progress of one dataset within that of the collection."""

    def __init__(self, progress: CollectionProgress, task: Task) -> None:
        self._progress, self._task = progress, task

    def start(self, title: str, total: int) -> None:  # noqa: ARG002  # the task has its name
        self._progress.started(self._task, total)

    def step(self, step: Step) -> None:
        self._progress.step(self._task, step)

    def validated(self, validation: Validation) -> None:
        """A collection tells of its steps alone."""

    def stop(self) -> None:
        pass
