"""Worker processes: one for each core, with one thread each.

A model of 0.6 M parameters gains little from a second thread, and processes whose threads compete
for the same cores lose more than that.
"""

import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from multiprocessing.synchronize import Event
from threading import Thread
from typing import TYPE_CHECKING

from loragen.core.config import LoraTrainConfig
from loragen.core.data.dataset import Dataset

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


@contextmanager
def worker_pool() -> Iterator[ProcessPoolExecutor]:
    """Yields a pool of processes, each with the base model loaded. They import their modules while
    this process does something else, and end with it."""
    context, count = _context(), min(MOST_WORKERS, os.cpu_count() or 1)
    cancelled = context.Event()
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_start, initargs=(cancelled,))
    if context.get_start_method() == "spawn":  # each process starts with its first job
        for _ in range(count):
            pool.submit(int)
    try:
        yield pool
    except BaseException:
        cancelled.set()  # jobs in the workers' queue cannot be cancelled by the pool
        raise
    finally:
        pool.shutdown(cancel_futures=True)


_cancelled: Event | None = None
"""The event of a worker that is set if the demo ends before its jobs."""


@cache
def base() -> "LanguageModel":
    """Returns the demo's base model, loaded once per process."""
    from loragen.core.base.load import load_base
    from loragen.core.config import DEMO

    return load_base(DEMO)


def _context() -> BaseContext:
    """Returns the context that starts workers: on Linux, a server process without threads forks
    them, having imported everything once; elsewhere, they are spawned. A fork of this process might
    hang, because torch has threads."""
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
    """Ends this process when its parent ends, even if that was killed."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def train_in_worker(config: LoraTrainConfig, dataset: Dataset) -> "LoraRun":
    """Trains an adapter as `lora train` does. Raises Interrupted if the demo was cancelled."""
    from loragen.core.errors import Interrupted
    from loragen.core.lora.train import train_adapter
    from loragen.core.progress import Silent

    if _cancelled and _cancelled.is_set():
        raise Interrupted("interrupted")
    return train_adapter(config, dataset, base(), Silent())
