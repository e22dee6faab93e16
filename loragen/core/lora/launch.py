"""The datasets of a collection one after the other, on this machine.

The datasets of a collection as tasks of a Ray cluster, an existing one or one started here.
"""

import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from loragen.core.base.load import load_training_base
from loragen.core.config import LoraTrainConfig
from loragen.core.data.documents import location
from loragen.core.errors import Interrupted, LoragenError, UsageError, one_line
from loragen.core.lora.settings import located
from loragen.core.lora.tasks import (
    Task,
    TaskOutcome,
    config_of,
    failed,
    interrupted,
    not_started,
)
from loragen.core.lora.train import train
from loragen.core.lora.worker import RunWatch, TrainingJob, TrainingResult, outcome_of, train_job
from loragen.core.progress import Progress
from loragen.core.run.loop import Interruption

log = logging.getLogger(__name__)

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
    config: LoraTrainConfig, tasks: Sequence[Task], progress: Progress
) -> Iterator[TaskOutcome]:
    """In this process, on one base model. Raises LoragenError where that does not load."""
    base = load_training_base(config)
    for index, task in enumerate(tasks):
        try:
            own = config_of(config, task)
            run = train(own, task.name, task.source, base, progress)
        except (KeyboardInterrupt, Interrupted) as error:
            yield TaskOutcome(task, "interrupted", None, str(error) or "interrupted", error)
            yield from not_started(tasks[index + 1 :])
            return
        except Exception as error:
            if launched_outside() and not isinstance(error, LoragenError):
                raise  # perhaps on this rank alone: the launcher has to stop the others
            yield failed(task, error)
        else:
            yield TaskOutcome(task, "trained", run)


def train_in_processes(
    config: LoraTrainConfig, tasks: Sequence[Task], progress: Progress
) -> Iterator[TaskOutcome]:
    """Each in a process of its own, from which Lightning starts those of the other devices."""
    interruption = Interruption()
    with interruption.awaited():
        for index, task in enumerate(tasks):
            progress.start(task.name, config.training.max_steps)
            job = TrainingJob(
                config=config_of(config, task), name=task.name, source=location(task.source)
            )
            watch = RunWatch(config, task)
            outcome = outcome_of(task, _run(job, watch, progress, interruption))
            yield outcome
            if interruption.requested or outcome.status == "interrupted":
                yield from not_started(tasks[index + 1 :])
                return


def _run(
    job: TrainingJob,
    watch: RunWatch,
    progress: Progress,
    interruption: Interruption,
) -> TrainingResult:
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
                    progress.step(step)
                if interruption.requested and not told:
                    process.terminate()
                    told = True
        finally:
            _end(process)
        if not result_file.is_file():
            return TrainingResult(
                status="failed", reason=f"its process ended with {process.returncode}"
            )
        return TrainingResult.model_validate_json(result_file.read_text(encoding="utf-8"))


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


RAY_POLL_SECONDS = 0.3
RAY_GRACE_SECONDS = 60
"""For the tasks that were cancelled, to save their step."""
STORE_BYTES = 100 * 2**20
"""Of a cluster started here: nothing but configurations and outcomes passes through it."""


@dataclass
class _Attempt:
    task: Task
    watch: RunWatch
    failures: int = 0
    shown: bool = False


def train_on_ray(
    config: LoraTrainConfig, tasks: Sequence[Task], progress: Progress
) -> Iterator[TaskOutcome]:
    """As many at a time as the cluster has room for, each in a process of its own.

    A worker that dies, or fails by no fault of the user's, is tried again, from its newest
    checkpoint. The files of all datasets and runs_dir have to be the same on every machine.
    Raises UsageError where Ray is not installed or its cluster cannot be had.
    """
    absolute = _absolute(config)
    with _cluster(config) as ray:
        collection = _Collection(ray, absolute, progress)
        interruption = Interruption()
        with interruption.awaited():
            for outcome in collection.run(tasks, interruption):
                yield _as_named(outcome, config)


class _Collection:
    def __init__(self, ray: Any, config: LoraTrainConfig, progress: Progress) -> None:
        self._ray, self._config, self._progress = ray, config, progress
        settings = config.launcher
        self._remote = ray.remote(
            num_cpus=settings.num_cpus,
            num_gpus=settings.num_gpus,
            max_calls=1,  # a fresh process for every dataset, which gives back all its memory
            max_retries=0,  # ours knows of the checkpoints
        )(train_job)
        self._running: dict[Any, _Attempt] = {}

    def run(self, tasks: Sequence[Task], interruption: Interruption) -> Iterator[TaskOutcome]:
        waiting = list(tasks)
        most = self._config.launcher.max_concurrent or len(waiting)
        while (waiting or self._running) and not interruption.requested:
            while waiting and len(self._running) < most:
                task = waiting.pop(0)
                self._submit(_Attempt(task, RunWatch(self._config, task)), None)
            yield from self._ended()
        if interruption.requested:
            yield from self._cancelled()
            yield from not_started(waiting)

    def _submit(self, attempt: _Attempt, resume: Path | None) -> None:
        task, config = attempt.task, config_of(self._config, attempt.task)
        config.data.dataset = _absolute_name(task)
        job = TrainingJob(
            config=config, name=task.name, source=location(task.source), resume=resume
        )
        self._running[self._remote.remote(job)] = attempt

    def _ended(self) -> list[TaskOutcome]:
        """Waits a moment; what has ended since, and tells of the steps of the rest."""
        ready, _ = self._ray.wait(list(self._running), timeout=RAY_POLL_SECONDS)
        for attempt in self._running.values():
            self._show(attempt)
        outcomes = (self._outcome(reference) for reference in ready)
        return [outcome for outcome in outcomes if outcome]

    def _show(self, attempt: _Attempt) -> None:
        if attempt.watch.directory and not attempt.shown:
            attempt.shown = True
            self._progress.start(attempt.task.name, self._config.training.max_steps)
        for step in attempt.watch.news():
            self._progress.step(step)

    def _outcome(self, reference: Any) -> TaskOutcome | None:
        """None where it is tried again."""
        attempt = self._running.pop(reference)
        try:
            return outcome_of(attempt.task, self._ray.get(reference))
        except self._ray.exceptions.TaskCancelledError:
            return not_started([attempt.task])[0]
        except self._ray.exceptions.RayError as error:
            return self._again(attempt, _result(error))

    def _again(self, attempt: _Attempt, result: TrainingResult) -> TaskOutcome | None:
        most = self._config.launcher.max_retries
        if attempt.failures >= most:
            return outcome_of(attempt.task, result)
        attempt.failures += 1
        run = attempt.watch.directory
        how = f"it goes on with {run}" if run else "it starts again"
        log.warning(
            "%s: %s; %s (retry %d of %d)",
            attempt.task.name,
            result.reason,
            how,
            attempt.failures,
            most,
        )
        self._submit(attempt, run)
        return None

    def _cancelled(self) -> Iterator[TaskOutcome]:
        """Asks what runs to save its step and to stop, and waits for it."""
        self._config.launcher.max_retries = 0
        for reference in self._running:
            self._ray.cancel(reference)
        until = time.monotonic() + RAY_GRACE_SECONDS
        while self._running and time.monotonic() < until:
            yield from self._ended()
        for reference, attempt in self._running.items():
            self._ray.cancel(reference, force=True)
            yield interrupted(attempt.task, "did not stop, and was ended")


@contextmanager
def _cluster(config: LoraTrainConfig) -> Iterator[Any]:
    """Ray, connected; a cluster that was started here ends with the block."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # It tells of dead workers on stdout; so do we, in one line, on stderr.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".*")
    try:
        ray: Any = import_module("ray")
        import_module("ray.exceptions")
    except ImportError:
        raise UsageError("launcher ray needs ray: pip install 'loragen[ray]'") from None
    address = config.launcher.address
    ours = {} if address else {"object_store_memory": STORE_BYTES, "include_dashboard": False}
    try:
        ray.init(
            address=address or "local", log_to_driver=False, logging_level=logging.FATAL, **ours
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UsageError(f"launcher.address {address}: {one_line(error)}") from None
    try:
        _check_room(config, ray.cluster_resources())
        yield ray
    finally:
        ray.shutdown()


def _check_room(config: LoraTrainConfig, resources: dict[str, float]) -> None:
    """A task that asks for more than there is would wait for ever."""
    asked = {"CPU": config.launcher.num_cpus, "GPU": config.launcher.num_gpus}
    for kind, number in asked.items():
        if number > resources.get(kind, 0):
            raise UsageError(
                f"launcher.num_{kind.lower()}s: a dataset asks for {number:g}, "
                f"the cluster has {resources.get(kind, 0):g}"
            )
    if not asked["GPU"] and resources.get("GPU"):
        log.warning("launcher.num_gpus is 0: the %d GPUs stay idle", resources["GPU"])


def _result(error: Exception) -> TrainingResult:
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return TrainingResult(
            status="failed", reason=shorten(one_line(cause), 300), traceback=str(error)
        )
    return TrainingResult(status="failed", reason=f"its worker died ({type(error).__name__})")


def _absolute(config: LoraTrainConfig) -> LoraTrainConfig:
    """Workers have a working directory of their own; and without a GPU they use the CPU, where
    Ray itself would leave them all on the first GPU."""
    absolute = located(config)
    absolute.runs_dir = str(Path(config.runs_dir).absolute())
    absolute.data.root = str(Path(config.data.root).absolute())
    if not config.launcher.num_gpus and config.trainer.accelerator == "auto":
        absolute.trainer.accelerator = "cpu"
    return absolute


def _as_named(outcome: TaskOutcome, config: LoraTrainConfig) -> TaskOutcome:
    """The run below runs_dir as the user wrote that."""
    if outcome.run is None:
        return outcome
    directory = Path(config.runs_dir) / outcome.run.directory.name
    return replace(outcome, run=replace(outcome.run, directory=directory))


def _absolute_name(task: Task) -> str:
    return location(task.source) if Path(task.wanted).is_file() else task.wanted
