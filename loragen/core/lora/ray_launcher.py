"""The datasets of a collection as tasks of a Ray cluster, an existing one or one started here."""

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from textwrap import shorten
from typing import Any

from loragen.core.config import LoraTrainConfig
from loragen.core.data.documents import location
from loragen.core.errors import UsageError, one_line
from loragen.core.interrupt import Interruption
from loragen.core.lora.collect import (
    CollectionProgress,
    Outcome,
    Task,
    config_of,
    interrupted,
    not_started,
)
from loragen.core.lora.identity import located
from loragen.core.lora.watch import RunWatch
from loragen.core.lora.worker import Job, Result, outcome_of, train_job

log = logging.getLogger(__name__)

POLL_SECONDS = 0.3
GRACE_SECONDS = 60
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
    config: LoraTrainConfig, tasks: Sequence[Task], progress: CollectionProgress
) -> Iterator[Outcome]:
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
    def __init__(self, ray: Any, config: LoraTrainConfig, progress: CollectionProgress) -> None:
        self._ray, self._config, self._progress = ray, config, progress
        settings = config.launcher
        self._remote = ray.remote(
            num_cpus=settings.num_cpus,
            num_gpus=settings.num_gpus,
            max_calls=1,  # a fresh process for every dataset, which gives back all its memory
            max_retries=0,  # ours knows of the checkpoints
        )(train_job)
        self._running: dict[Any, _Attempt] = {}

    def run(self, tasks: Sequence[Task], interruption: Interruption) -> Iterator[Outcome]:
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
        job = Job(config=config, name=task.name, source=location(task.source), resume=resume)
        self._running[self._remote.remote(job)] = attempt

    def _ended(self) -> list[Outcome]:
        """Waits a moment; what has ended since, and tells of the steps of the rest."""
        ready, _ = self._ray.wait(list(self._running), timeout=POLL_SECONDS)
        for attempt in self._running.values():
            self._show(attempt)
        outcomes = (self._outcome(reference) for reference in ready)
        return [outcome for outcome in outcomes if outcome]

    def _show(self, attempt: _Attempt) -> None:
        if attempt.watch.directory and not attempt.shown:
            attempt.shown = True
            self._progress.started(attempt.task, self._config.training.max_steps)
        for step in attempt.watch.news():
            self._progress.step(attempt.task, step)

    def _outcome(self, reference: Any) -> Outcome | None:
        """None where it is tried again."""
        attempt = self._running.pop(reference)
        try:
            return outcome_of(attempt.task, self._ray.get(reference))
        except self._ray.exceptions.TaskCancelledError:
            return not_started([attempt.task])[0]
        except self._ray.exceptions.RayError as error:
            return self._again(attempt, _result(error))

    def _again(self, attempt: _Attempt, result: Result) -> Outcome | None:
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

    def _cancelled(self) -> Iterator[Outcome]:
        """Asks what runs to save its step and to stop, and waits for it."""
        self._config.launcher.max_retries = 0
        for reference in self._running:
            self._ray.cancel(reference)
        until = time.monotonic() + GRACE_SECONDS
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


def _result(error: Exception) -> Result:
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return Result(status="failed", reason=shorten(one_line(cause), 300), traceback=str(error))
    return Result(status="failed", reason=f"its worker died ({type(error).__name__})")


def _absolute(config: LoraTrainConfig) -> LoraTrainConfig:
    """Workers have a working directory of their own; and without a GPU they use the CPU, where
    Ray itself would leave them all on the first GPU."""
    absolute = located(config)
    absolute.runs_dir = str(Path(config.runs_dir).absolute())
    absolute.data.root = str(Path(config.data.root).absolute())
    if not config.launcher.num_gpus and config.trainer.accelerator == "auto":
        absolute.trainer.accelerator = "cpu"
    return absolute


def _as_named(outcome: Outcome, config: LoraTrainConfig) -> Outcome:
    """The run below runs_dir as the user wrote that."""
    if outcome.run is None:
        return outcome
    directory = Path(config.runs_dir) / outcome.run.directory.name
    return replace(outcome, run=replace(outcome.run, directory=directory))


def _absolute_name(task: Task) -> str:
    return location(task.source) if Path(task.wanted).is_file() else task.wanted
