"""The demo's processes end with it, however it ends."""

import subprocess
import sys
from multiprocessing import get_context
from threading import Event

import psutil
import pytest

from loragen.core.errors import Interrupted
from loragen.demo import workers
from loragen.demo.workers import train_in_worker, worker_pool

WAITING = """\
import os, sys, time
from loragen.demo import workers

workers.PRELOADED.clear()
if __name__ == "__main__":
    with workers.worker_pool() as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        time.sleep(100)
"""


@pytest.mark.parametrize("spawn", [False, True], ids=["default", "spawn"])
def test_workers_start_and_return_results(monkeypatch, spawn):
    if spawn:
        monkeypatch.setattr(workers, "_context", lambda: get_context("spawn"))
        monkeypatch.setattr(workers, "MOST_WORKERS", 1)
    with worker_pool() as pool:
        assert pool.submit(divmod, 7, 2).result() == (3, 1)


def test_queued_jobs_of_a_cancelled_demo_do_not_start(monkeypatch):
    cancelled = Event()
    cancelled.set()
    monkeypatch.setattr(workers, "_cancelled", cancelled)
    with pytest.raises(Interrupted):
        train_in_worker(None, None)


@pytest.mark.skipif(sys.platform == "win32", reason="kills as POSIX does")
def test_no_worker_survives_a_demo_that_was_killed(tmp_path):
    (tmp_path / "waiting.py").write_text(WAITING, encoding="utf-8")
    with subprocess.Popen(
        [sys.executable, "waiting.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as demo:
        worker = psutil.Process(int(demo.stdout.readline()))
        demo.kill()
    worker.wait(timeout=20)
