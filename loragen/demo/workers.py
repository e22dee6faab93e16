"""Many small jobs side by side: one process per core, one thread each.

A model of 0.6 M parameters gains little from a second thread, and two processes whose threads
fight over the same cores lose far more.
"""

import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from multiprocessing.context import BaseContext
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, ParamSpec, TypeVar

from loragen.core.config import LoraTrainConfig

if TYPE_CHECKING:
    from loragen.core.base_models import BaseModel

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
    """A pool whose processes have loaded the base model once. They start with it, beside whatever
    this process does next."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(
            min(MOST_WORKERS, os.cpu_count() or 1), mp_context=_context(), initializer=_start
        )
        self._pool.submit(int)  # the pool starts nothing before there is something to do

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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


@cache
def base() -> "BaseModel":
    """The demo's base model, loaded once a process."""
    from loragen.core.base_models import load_base
    from loragen.core.config import DEMO

    return load_base(DEMO)


def _context() -> BaseContext:
    """Never a fork of this process, which may hang with torch's threads; on Linux, forks of one
    that has imported everything once for all of them, and started no thread."""
    if sys.platform != "linux":
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    return context


def _start() -> None:
    import torch

    torch.set_num_threads(1)
    base()


def _train(job: Job) -> Done:
    from loragen.core.lora.train import train
    from loragen.core.progress import Silent

    run = train(job.config, job.name, job.file, base(), Silent())
    return Done(job, run.directory, run.manifest.seconds or 0.0, run.manifest.steps[-1])
