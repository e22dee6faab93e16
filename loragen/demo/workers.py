"""Worker processes: one for each core, with one thread each.

A model of 0.6 M parameters gains little from a second thread, and processes whose threads compete
for the same cores lose more than that.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from multiprocessing.synchronize import Event
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from loragen.core.config import LoraTrainConfig

if TYPE_CHECKING:
    from loragen.core.base.load import LanguageModel
    from loragen.core.run.directory import LoraRun

MOST_WORKERS = 8
PRELOADED = [
    "loragen.core.lora.train",
    "loragen.demo.run",
    "peft",
    "transformers.models.qwen2.modeling_qwen2",
]
"""The modules that workers need. Importing them, with torch and Lightning, takes seconds."""

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Job:
    """One adapter to be trained as by `lora train`."""

    name: str
    """Of the dataset."""
    file: Path
    config: LoraTrainConfig


class Workers:
    """A pool of processes, each with the base model loaded. Their modules are imported while this
    process does something else."""

    def __init__(self) -> None:
        context, count = _context(), min(MOST_WORKERS, os.cpu_count() or 1)
        self._cancelled = context.Event()
        self._pool = ProcessPoolExecutor(
            count, mp_context=context, initializer=_start, initargs=(self._cancelled,)
        )
        if context.get_start_method() == "spawn":  # a process starts when it gets its first job
            for _ in range(count):
                self._pool.submit(int)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:  # jobs in the workers' queue cannot be cancelled by the pool
            self._cancelled.set()
        self._pool.shutdown(cancel_futures=True)

    def train(self, jobs: Iterable[Job]) -> list[Future["LoraRun"]]:
        return [self.submit(run_job, job) for job in jobs]

    def submit(
        self,
        function: Callable[Arguments, Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Future[Result]:
        """Runs a module's function in a worker; it, its arguments and its result are pickled."""
        return self._pool.submit(function, *args, **kwargs)


_cancelled: Event | None = None
"""In a worker: set where the demo has ended before its jobs."""


@cache
def base() -> "LanguageModel":
    """The demo's base model, loaded once per process."""
    from loragen.core.base.load import load_base
    from loragen.core.config import DEMO

    return load_base(DEMO)


def _context() -> BaseContext:
    """Never forks this process, which may hang with torch's threads. On Linux, forks a server
    process that has imported everything once and has started no thread; elsewhere, spawns."""
    if sys.platform != "linux":
        return get_context("spawn")
    from multiprocessing.forkserver import ensure_running

    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is handled by this process
    try:
        ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)
    return context


def _start(cancelled: Event) -> None:
    """Initialises a worker."""
    import torch

    global _cancelled
    _cancelled = cancelled
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a training installs its own handler
    Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    base()


def _end_with_parent() -> None:
    """Ends this process where the parent was killed: nobody else would."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def run_job(job: Job) -> "LoraRun":
    """Trains an adapter. Raises Interrupted where the demo has been cancelled."""
    from loragen.core.errors import Interrupted
    from loragen.core.lora.train import train
    from loragen.core.progress import Silent

    if _cancelled and _cancelled.is_set():
        raise Interrupted("interrupted")
    return train(job.config, job.name, job.file, base(), Silent())
