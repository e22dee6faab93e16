"""Many small jobs side by side: one process per core, one thread each.

A model of 0.6 M parameters gains little from a second thread, and two processes whose threads
fight over the same cores lose far more.
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
from typing import TYPE_CHECKING, NamedTuple, ParamSpec, TypeVar

from loragen.core.config import LoraTrainConfig

if TYPE_CHECKING:
    from loragen.core.base.load import LanguageModel

MOST_WORKERS = 8
HEAVY = [
    "loragen.core.lora.train",
    "loragen.demo.contest",
    "peft",
    "transformers.models.qwen2.modeling_qwen2",
]
"""What the workers will run. Importing it takes seconds, with torch and Lightning."""

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Job:
    """One call of `lora train`."""

    name: str
    file: Path
    config: LoraTrainConfig


class Done(NamedTuple):
    job: Job
    directory: Path
    seconds: float
    steps: int


class Workers:
    """A pool whose processes have loaded the base model once. What they need is imported beside
    whatever this process does next: by the one that they are forked from, or by each of them."""

    def __init__(self) -> None:
        context, count = _context(), min(MOST_WORKERS, os.cpu_count() or 1)
        self._given_up = context.Event()
        self._pool = ProcessPoolExecutor(
            count, mp_context=context, initializer=_start, initargs=(self._given_up,)
        )
        if context.get_start_method() == "spawn":  # each starts with a job, and not before
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
        if kind is not None:  # some jobs are beyond being cancelled: they are in the workers' queue
            self._given_up.set()
        self._pool.shutdown(cancel_futures=True)

    def train(self, jobs: Iterable[Job]) -> list[Future[Done]]:
        return [self.submit(_train, job) for job in jobs]

    def submit(
        self,
        function: Callable[Arguments, Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Future[Result]:
        """A function of a module; it, its arguments and its result are pickled."""
        return self._pool.submit(function, *args, **kwargs)


_given_up: Event | None = None
"""In a worker: set where the demo has ended before its jobs."""


@cache
def base() -> "LanguageModel":
    """The demo's base model, loaded once a process."""
    from loragen.core.base.load import load_base
    from loragen.core.config import DEMO

    return load_base(DEMO)


def _context() -> BaseContext:
    """Never a fork of this process, which may hang with torch's threads; on Linux, forks of one
    that has imported everything once for all of them, and started no thread."""
    if sys.platform != "linux":
        return get_context("spawn")
    from multiprocessing.forkserver import ensure_running

    context = get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is answered here, in one line
    try:
        ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)
    return context


def _start(given_up: Event) -> None:
    import torch

    global _given_up
    _given_up = given_up
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a training sees to it itself, while it runs
    Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    base()


def _end_with_parent() -> None:
    """Where that was killed, nobody else would ever end this process."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _train(job: Job) -> Done:
    from loragen.core.errors import Interrupted
    from loragen.core.lora.train import train
    from loragen.core.progress import Silent

    if _given_up and _given_up.is_set():
        raise Interrupted("interrupted")
    run = train(job.config, job.name, job.file, base(), Silent())
    return Done(job, run.directory, run.manifest.seconds or 0.0, run.manifest.steps[-1])
