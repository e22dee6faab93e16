"""`lora train`: one adapter for each of many datasets. Light until something trains.

Where one device trains all datasets, they train in this process, one after the other, on one base
model. Otherwise every dataset trains in a worker process (`loragen.core.lora.worker`), which is
started here or by Ray. A dataset that fails stops no other.
"""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, Self

from loragen.core.config import LoraTrainConfig
from loragen.core.errors import Interrupted, LoragenError, UsageError, one_line, pip_install
from loragen.core.lora.tasks import Task, TaskOutcome, earlier_runs, with_absolute_paths
from loragen.core.lora.worker import JobResult, StatusFile, TrainingJob, run_job
from loragen.core.outputs import check_writable
from loragen.core.progress import Progress
from loragen.core.run.directory import LoraManifest, Run
from loragen.core.run.lock import writer_of

log = logging.getLogger(__name__)

KEPT = 16
"""The datasets whose rows stay in memory from their check to their training. Those of further ones
are read a second time, so that memory does not grow with the number of datasets."""
POLL_SECONDS = 0.2
KILL_AFTER_SECONDS = 30
"""The time between the second Ctrl+C, which terminates a worker, and its end by force."""
RAY_GRACE_SECONDS = 60.0
"""The time in which an interrupted worker on Ray has to save its step."""
RAY_STORE_BYTES = 100 * 2**20
"""The size of the object store of a cluster started here; only configurations pass through it."""


def collect(
    config: LoraTrainConfig, tasks: Sequence[Task], progress: Progress, force: bool = False
) -> list[TaskOutcome]:
    """Trains an adapter for each task; returns the outcomes in the order of the tasks.

    A task with a finished run is skipped, unless `force`. Every file is read before the first
    dataset trains. Raises an error only if there is a single task, or if no task can train:
    the base model does not load, there is no cluster.
    """
    if Path(config.runs_dir).exists() and not Path(config.runs_dir).is_dir():
        raise UsageError(f"runs_dir {config.runs_dir}: is a file; give a directory")
    outcomes: dict[Task, TaskOutcome] = {}

    def record(outcome: TaskOutcome) -> None:
        outcomes[outcome.task] = outcome
        outcome.task.dataset.release()
        if len(tasks) == 1 and outcome.error:
            raise outcome.error
        outcome.show(progress)

    progress.command_started([task.name for task in tasks])
    try:
        remaining: list[Task] = []
        for task in tasks:
            if outcome := _without_training(config, task, force):
                record(outcome)
                continue
            remaining.append(task)
            if len(remaining) > KEPT:
                task.dataset.release()
        if remaining:
            check_writable(Path(config.runs_dir))
            for outcome in _train(config, remaining, len(tasks) > 1, progress):
                record(outcome)
    finally:
        progress.command_ended()
    return [outcomes[task] for task in tasks]


def _without_training(config: LoraTrainConfig, task: Task, force: bool) -> TaskOutcome | None:
    """Returns the outcome of a task whose run is finished or whose file is bad."""
    try:
        if not force:
            finished, unfinished = earlier_runs(config, task)
            if finished:
                reason = f"done already in {finished.directory} (--force trains it again)"
                return TaskOutcome(task, "skipped", finished, reason)
        task.dataset.check(config.data.skip_bad_rows)
    except Exception as error:  # noqa: BLE001  # an error of this dataset stops no other
        return TaskOutcome.failed(task, error)
    if not force and unfinished:
        directory = unfinished.directory
        if writer := writer_of(directory):
            log.info("%s: %s is being written by %s; this is another", task.name, directory, writer)
        else:
            log.info("%s: there is an unfinished run: --resume %s", task.name, directory)
    return None


def _train(
    config: LoraTrainConfig, tasks: Sequence[Task], several: bool, progress: Progress
) -> Iterator[TaskOutcome]:
    if config.launcher.name == "ray":
        with ray_cluster(config) as launcher:
            yield from _train_in_workers(config, tasks, progress, launcher)
    elif several and needs_workers(config):
        yield from _train_in_workers(config, tasks, progress, Launcher(Subprocess))
    else:
        yield from _train_in_this_process(config, tasks, progress)


def needs_workers(config: LoraTrainConfig) -> bool:
    """Returns whether Lightning would start the processes of further devices itself.

    It does so by running the command again, once for all datasets, and after a dataset that failed
    those processes would wait for ever. In a worker they end with the dataset.
    """
    if _launched_externally():
        return False
    several = config.trainer.devices not in (1, "1")
    if config.trainer.devices in ("auto", "-1", -1):
        import torch

        several = config.trainer.accelerator != "cpu" and torch.cuda.device_count() > 1
    return several or config.trainer.num_nodes > 1


def _launched_externally() -> bool:
    """Returns whether torchrun or Slurm has started this process, once for each device."""
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    return "LOCAL_RANK" in os.environ or bool(SLURMEnvironment.detect())


def _train_in_this_process(
    config: LoraTrainConfig, tasks: Sequence[Task], progress: Progress
) -> Iterator[TaskOutcome]:
    """Trains on one base model. Raises LoragenError if that does not load."""
    from loragen.core.base.load import load_training_base
    from loragen.core.lora.train import train_adapter

    base = load_training_base(config)
    for index, task in enumerate(tasks):
        try:
            run = train_adapter(
                task.config(config), task.dataset, base, progress, None, task.validation
            )
        except (KeyboardInterrupt, Interrupted) as error:
            yield TaskOutcome(task, "interrupted", None, str(error) or "interrupted", error)
            yield from map(TaskOutcome.interrupted, tasks[index + 1 :])
            return
        except Exception as error:
            if _launched_externally() and not isinstance(error, LoragenError):
                raise  # if it is on this device alone, torchrun has to stop the others
            yield TaskOutcome.failed(task, error)
        else:
            yield TaskOutcome(task, "trained", run)


# ---------------------------------------------------------------------------- worker processes


class Worker(Protocol):
    """A worker process, as its parent sees it."""

    def is_running(self) -> bool: ...

    def interrupt(self) -> None:
        """Makes the worker save its step and end."""

    def kill(self) -> None:
        """Ends the worker by force."""

    def exit_reason(self) -> str:
        """Returns why the worker has ended without a result."""


@dataclass(frozen=True)
class Launcher:
    """Starts workers, as subprocesses or as tasks of a Ray cluster."""

    start: Callable[[TrainingJob, StatusFile], Worker]
    folder: Path | None = None
    """A directory that the workers see, for their status files; None: any temporary one."""
    max_concurrent: int = 1
    max_retries: int = 0
    grace_seconds: float = inf
    """The time in which an interrupted worker has to save its step."""


@dataclass
class _Attempt:
    """A task in training: its current worker, and what that has reported."""

    task: Task
    job: TrainingJob
    status: StatusFile
    worker: Worker
    failures: int = 0
    started: bool = False
    directory: Path | None = None
    result: JobResult | None = None

    def forward_reports(self, progress: Progress, steps: int) -> None:
        for report in self.status.new_reports():
            if not self.started:
                self.started = True
                progress.training_started(self.task.name, steps)
            if report.step:
                progress.step(report.step)
            if report.warning:
                log.warning("%s: %s", self.task.name, report.warning)
            self.directory = report.directory or self.directory
            self.result = report.result or self.result

    def retry(self, launcher: Launcher) -> bool:
        """Starts the worker again if it has failed through no fault of the user."""
        result = self.result
        if (result and not result.traceback) or self.failures == launcher.max_retries:
            return False
        self.failures += 1
        log.warning(
            "%s: %s; %s (retry %d of %d)",
            self.task.name,
            result.reason if result else self.worker.exit_reason(),
            f"resuming {self.directory}" if self.directory else "starting again",
            self.failures,
            launcher.max_retries,
        )
        self.job.resume, self.result = self.directory, None
        self.status = StatusFile(self.status.path.with_suffix(f".{self.failures}.jsonl"))
        self.worker = launcher.start(self.job, self.status)
        return True

    def outcome(self, runs_dir: str, interrupted: bool) -> TaskOutcome:
        """Returns the outcome once the worker has ended."""
        result = self.result
        if result is None and interrupted:
            reason = "interrupted before its training began" if self.started else "not started"
            return TaskOutcome.interrupted(self.task, reason)
        result = result or JobResult(status="failed", reason=self.worker.exit_reason())
        if result.status == "interrupted":
            return TaskOutcome.interrupted(self.task, result.reason)
        if result.status == "failed" or self.directory is None:
            error = LoragenError(result.reason)
            if result.traceback:
                error.add_note(result.traceback)  # for --debug
            return TaskOutcome(self.task, "failed", None, result.reason, error)
        directory = Path(runs_dir) / self.directory.name  # relative if runs_dir is
        return TaskOutcome(self.task, "trained", Run.open(directory, LoraManifest))


def _train_in_workers(
    config: LoraTrainConfig, tasks: Sequence[Task], progress: Progress, launcher: Launcher
) -> Iterator[TaskOutcome]:
    """Trains every task in a worker, as many at a time as the launcher allows.

    A worker that dies, or fails through no fault of the user, is started again up to
    `max_retries` times and resumes the run that it has reported. A first Ctrl+C interrupts the
    workers, a second one (KeyboardInterrupt) kills them.
    """
    from loragen.core.run.loop import Interruption

    for task in tasks:
        task.dataset.release()  # the workers read it themselves
    interruption = Interruption()
    with (
        interruption.handle_signals(),
        TemporaryDirectory(prefix=".loragen-", dir=launcher.folder) as folder,
        _WorkerPool(config, tasks, progress, launcher, Path(folder)) as pool,
    ):
        while pool.running or pool.waiting:
            if interruption.requested and not pool.interrupted:
                yield from pool.interrupt()
            pool.start_due()
            time.sleep(POLL_SECONDS)
            for outcome in pool.poll(may_retry=not interruption.requested):
                # On this machine a signal to one worker is meant for the command: no other starts.
                # On a cluster it is the worker's own, for example when its machine is reclaimed.
                if outcome.status == "interrupted" and config.launcher.name == "local":
                    interruption.requested = True
                yield outcome


class _WorkerPool:
    """The workers of a command: those that run, and the tasks that wait for one. All workers that
    still run are killed at the end of its context."""

    def __init__(
        self,
        config: LoraTrainConfig,
        tasks: Sequence[Task],
        progress: Progress,
        launcher: Launcher,
        folder: Path,
    ) -> None:
        """The status files are written to `folder`."""
        self.config, self.progress, self.launcher, self.folder = config, progress, launcher, folder
        self.waiting, self.running = list(tasks), list[_Attempt]()
        self.interrupted = False
        self._kill_at = inf

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for attempt in self.running:
            attempt.worker.kill()

    def interrupt(self) -> Iterator[TaskOutcome]:
        """Interrupts all workers; yields the outcomes of the tasks that had none yet."""
        self.interrupted = True
        self._kill_at = time.monotonic() + self.launcher.grace_seconds
        for attempt in self.running:
            attempt.worker.interrupt()
        yield from map(TaskOutcome.interrupted, self.waiting)
        self.waiting.clear()

    def start_due(self) -> None:
        """Starts workers for waiting tasks, up to the launcher's number."""
        while self.waiting and len(self.running) < self.launcher.max_concurrent:
            task = self.waiting.pop(0)
            job = TrainingJob(
                config=task.config(self.config), name=task.name, location=task.dataset.location
            )
            status = StatusFile(self.folder / f"{len(self.waiting)}.jsonl")
            worker = self.launcher.start(job, status)
            self.running.append(_Attempt(task, job, status, worker))

    def poll(self, may_retry: bool) -> Iterator[TaskOutcome]:
        """Forwards the reports of the workers; yields the outcomes of those that have ended and
        are not retried, or that have not stopped in time after an interruption."""
        for attempt in list(self.running):
            ended = not attempt.worker.is_running()  # before its reports, to miss none of them
            attempt.forward_reports(self.progress, self.config.training.max_steps)
            if ended and may_retry and attempt.retry(self.launcher):
                continue
            if ended:
                self.running.remove(attempt)
                yield attempt.outcome(self.config.runs_dir, interrupted=not may_retry)
            elif time.monotonic() >= self._kill_at:
                self.running.remove(attempt)
                attempt.worker.kill()
                reason = f"did not stop within {self.launcher.grace_seconds:g} s, killed"
                yield TaskOutcome.interrupted(attempt.task, reason)


class Subprocess:
    """A worker on this machine, from which Lightning starts those of further devices."""

    def __init__(self, job: TrainingJob, status: StatusFile) -> None:
        job_file = status.path.with_suffix(".json")
        job_file.write_text(job.model_dump_json(), encoding="utf-8")
        module = "loragen.core.lora.worker"
        command = [sys.executable, "-m", module, str(job_file), str(status.path)]
        # In its own session, so that the terminal's Ctrl+C does not reach it, but only our signal.
        self._process = subprocess.Popen(command, start_new_session=True)

    def is_running(self) -> bool:
        return self._process.poll() is None

    def interrupt(self) -> None:
        if sys.platform != "win32":  # on Windows the console itself sends Ctrl+C to it
            self._process.terminate()

    def kill(self) -> None:
        """Ends the worker; a SIGTERM before gives it time to record that it was interrupted."""
        if self.is_running():
            self._process.terminate()
            try:
                self._process.wait(KILL_AFTER_SECONDS)
            except subprocess.TimeoutExpired:
                if sys.platform == "win32":
                    self._process.kill()
                else:  # including the processes of further devices
                    os.killpg(self._process.pid, signal.SIGKILL)

    def exit_reason(self) -> str:
        return f"its process ended with exit code {self._process.returncode}"


# ---------------------------------------------------------------------------- Ray


@contextmanager
def ray_cluster(config: LoraTrainConfig) -> Iterator[Launcher]:
    """Connects to Ray and yields a launcher of its tasks; a cluster that was started here ends with
    the block. All dataset files and runs_dir have to be on a file system that its machines share.

    Raises UsageError if Ray is not installed, there is no such cluster, or no machine of it has
    what one dataset needs.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray reports dead workers on stdout; loragen reports them in one line on stderr.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".*")
    try:
        ray: Any = import_module("ray")
        import_module("ray.exceptions")
    except ImportError:
        raise UsageError(f"launcher ray needs ray: {pip_install('ray')}") from None
    address = config.launcher.address
    ours = {} if address else {"object_store_memory": RAY_STORE_BYTES, "include_dashboard": False}
    try:
        ray.init(
            address=address or "local", log_to_driver=False, logging_level=logging.FATAL, **ours
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UsageError(f"launcher.address {address}: {one_line(error)}") from None
    try:
        resources = ray.cluster_resources()
        needs = {"CPU": config.launcher.num_cpus, "GPU": config.launcher.num_gpus}
        for kind, number in needs.items():
            if number > resources.get(kind, 0):  # it would wait for ever
                raise UsageError(
                    f"launcher.num_{kind.lower()}s: a dataset needs {number:g}, "
                    f"the cluster has {resources.get(kind, 0):g}"
                )
        if not needs["GPU"] and resources.get("GPU"):
            log.warning("launcher.num_gpus is 0: the %d GPUs stay idle", resources["GPU"])
        runs_dir = Path(config.runs_dir).absolute()
        runs_dir.mkdir(parents=True, exist_ok=True)
        task = ray.remote(
            num_cpus=config.launcher.num_cpus,
            num_gpus=config.launcher.num_gpus,
            max_calls=1,  # a new process for every dataset, which frees all its memory
            max_retries=0,  # Ray's own retries would not resume
        )(run_job)
        yield Launcher(
            lambda job, status: RayWorker(ray, task.remote(_absolute(job, config), status.path)),
            folder=runs_dir,
            max_concurrent=config.launcher.max_concurrent or 10**6,  # Ray itself queues the rest
            max_retries=config.launcher.max_retries,
            grace_seconds=RAY_GRACE_SECONDS,
        )
    finally:
        ray.shutdown()


def _absolute(job: TrainingJob, config: LoraTrainConfig) -> TrainingJob:
    """Returns the job for a process with another working directory."""
    own = with_absolute_paths(job.config)
    own.runs_dir = str(Path(own.runs_dir).absolute())
    own.data.root = str(Path(own.data.root).absolute())
    if own.data.dataset and Path(own.data.dataset).is_file():
        own.data.dataset = job.location
    if not config.launcher.num_gpus and own.trainer.accelerator == "auto":
        own.trainer.accelerator = "cpu"  # Ray itself would leave all workers on the first GPU
    return job.model_copy(update={"config": own})


class RayWorker:
    """A task of the cluster that runs a training job."""

    def __init__(self, ray: Any, reference: Any) -> None:
        self._ray, self._reference = ray, reference

    def is_running(self) -> bool:
        ready, _ = self._ray.wait([self._reference], timeout=0)
        return not ready

    def interrupt(self) -> None:
        self._ray.cancel(self._reference)  # raises KeyboardInterrupt in the task

    def kill(self) -> None:
        self._ray.cancel(self._reference, force=True)

    def exit_reason(self) -> str:
        try:
            self._ray.get(self._reference)
        except self._ray.exceptions.RayError as error:
            return f"its worker died ({type(error).__name__})"
        return "its worker ended without a result"
