"""A run belongs to one process: a second one is refused, and a dead one frees it."""

import json
import os
import signal
import socket
import sys
import threading
import time
from functools import partial

import pytest

from loragen.core.config import dump
from loragen.core.errors import LoragenError, UsageError
from loragen.core.files import write_json
from loragen.core.lora.train import LoraPoint
from loragen.core.lora.worker import StatusFile, TrainingJob, run_job
from loragen.core.progress import Silent
from loragen.core.run import lock as locks
from loragen.core.run.directory import GeneratorManifest, LoraManifest, read_manifest
from loragen.core.run.lock import LOCK, WRITER, RunLock, writer_of
from tests.conftest import rows_of
from tests.processes import commands

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals that stop and continue")
STEPS = 60
LONG = {
    "training.max_steps": STEPS,
    "schedule.stage1_steps": 20,
    "checkpoints.first_step": 30,
    "final_model": "none",
}


@pytest.fixture
def quick(monkeypatch):
    """Short times, so that waiting for another machine takes no seconds."""
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(locks, "SILENT_SECONDS", 0.4)
    monkeypatch.setattr(locks, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(locks, "CHILDREN_SECONDS", 0.3)


@pytest.fixture
def start(tmp_path):
    """Starts a command in the directory of the test."""
    with commands() as begin:
        yield partial(begin, tmp_path)


@pytest.fixture
def lora(start, lora_config, dataset, tmp_path):
    """`lora(settings)` starts a training of some seconds, into runs/."""

    def run(settings=None):
        config = lora_config({**LONG, **(settings or {}), "runs_dir": str(tmp_path / "runs")})
        (tmp_path / "c.yaml").write_text(dump(config), encoding="utf-8")
        rows = dataset(rows_of(("red", "green", "blue"), count=40))
        return start("lora", "train", "--config", tmp_path / "c.yaml", "--dataset", rows)

    return run


def begun(process, folder):
    """The run of a process, once it has logged three steps."""
    for _ in range(6000):
        found = list(folder.glob("*/metrics.jsonl"))
        if found and found[0].read_bytes().count(b"\n") >= 3:
            return found[0].parent
        assert process.running(), process.finish()
        time.sleep(0.01)
    raise AssertionError("the training does not get on")


def steps_of(run, name="train/loss"):
    entries = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [entry["step"] for entry in entries if name in entry]


# ---------------------------------------------------------------------------- two processes


@posix
@pytest.mark.parametrize("command", ["lora", "gen"])
def test_a_live_run_is_not_resumed(command, lora, start, gen_config, loragen, tmp_path):
    if command == "lora":
        process, folder, kind = lora(), tmp_path / "runs", LoraManifest
    else:
        config = gen_config({"training.max_steps": STEPS, "training.max_epochs": 500})
        (tmp_path / "g.yaml").write_text(dump(config), encoding="utf-8")
        process = start("gen", "train", "--config", tmp_path / "g.yaml")
        folder, kind = tmp_path / "experiments", GeneratorManifest
    run = begun(process, folder)
    os.kill(process.pid, signal.SIGSTOP)  # it lives, however long this test takes
    second = loragen(command, "train", "--resume", run)
    assert second.exit_code == 2
    assert second.stderr.splitlines()[-1] == (
        f"error: {run} is being written by process {process.pid} on {socket.gethostname()}"
    )
    assert writer_of(run) == f"process {process.pid} on {socket.gethostname()}"
    assert read_manifest(run, kind).status == "running"
    os.kill(process.pid, signal.SIGCONT)
    assert process.finish()[0] == 0
    assert read_manifest(run, kind).status == "success"
    assert steps_of(run) == list(range(1, STEPS + 1))
    assert writer_of(run) is None
    assert not (run / WRITER).exists()

    again = loragen(command, "train", "--resume", run)
    assert again.exit_code == 0
    assert "nothing is left to do" in again.stderr


@posix
@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_process_frees_its_run(lora, start, workers, tmp_path):
    process = lora({"data.workers": workers})
    run = begun(process, tmp_path / "runs")
    os.kill(process.pid, signal.SIGKILL)  # alone: the workers notice by themselves
    assert process.finish()[0] == -signal.SIGKILL
    assert (run / WRITER).exists()
    second = start("lora", "train", "--resume", run)
    code, out, err = second.finish()
    assert (code, out) == (0, f"{run}\n"), err
    assert steps_of(run) == list(range(1, STEPS + 1))


@posix
def test_a_worker_is_not_started_again_where_another_process_writes(lora, tmp_path):
    """A retry resumes the run that its first attempt has begun, which may live after all: a machine
    that does not answer is not always dead."""
    process = lora()
    run = begun(process, tmp_path / "runs")
    os.kill(process.pid, signal.SIGSTOP)
    point = LoraPoint.find(run)
    job = TrainingJob(
        config=point.config, name="colors", location=point.manifest.dataset.path, resume=run
    )
    run_job(job, tmp_path / "status.jsonl")
    *_, last = StatusFile(tmp_path / "status.jsonl").new_reports()
    assert last.result.status == "failed"
    assert f"is being written by process {process.pid}" in last.result.reason
    assert not last.result.traceback  # a traceback would start another retry
    os.kill(process.pid, signal.SIGCONT)
    assert process.finish()[0] == 0


@posix
def test_another_training_of_the_dataset_says_that_one_is_running(lora, loragen, tmp_path):
    process = lora()
    run = begun(process, tmp_path / "runs")
    os.kill(process.pid, signal.SIGSTOP)
    settings = ("--set", "training.max_steps=60", "--dataset", tmp_path / "colors.jsonl")
    second = loragen("lora", "train", "--config", tmp_path / "c.yaml", *settings)
    assert second.exit_code == 0
    assert f"{run} is being written by process {process.pid}" in second.stderr
    assert second.stdout.strip() != str(run)


# ---------------------------------------------------------------------------- in one process


class TakenAway(Silent):
    """Another machine takes the run at a step, as it may if this process stood still."""

    def __init__(self, step, runs):
        self.at, self.runs = step, runs

    def step(self, step):
        if step.step == self.at:
            (run,) = self.runs.iterdir()
            write_json(run / WRITER, {"process": 1, "host": "elsewhere", "token": "x"})
            manifest = read_manifest(run, LoraManifest)
            write_json(run / "manifest.json", {**manifest.model_dump(), "status": "success"})


def test_a_training_that_has_lost_its_run_writes_no_more(lora_config, dataset, base, tmp_path):
    from loragen.core.data.dataset import Dataset
    from loragen.core.lora.train import train_adapter

    taken = TakenAway(6, tmp_path / "runs")
    with pytest.raises(LoragenError, match="is now written by process 1 on elsewhere"):
        train_adapter(lora_config(), Dataset(dataset(), "colors"), base, taken)
    (run,) = (tmp_path / "runs").iterdir()
    assert read_manifest(run, LoraManifest).status == "success"  # it does not go backwards
    assert [file.name for file in (run / "checkpoints").iterdir()] == ["checkpoint-step-005.ckpt"]
    assert (run / WRITER).exists()


def test_a_lock_is_taken_once_and_freed_once(quick, tmp_path):
    first = RunLock(tmp_path).acquire()
    with pytest.raises(UsageError, match=f"is being written by process {os.getpid()} on "):
        RunLock(tmp_path).acquire()
    first.release()
    first.release()
    second = RunLock(tmp_path).acquire()
    first.release()  # not the second's
    assert second.is_ours()
    assert writer_of(tmp_path)
    second.release()
    assert writer_of(tmp_path) is None


def foreign(directory, host="elsewhere"):
    write_json(directory / WRITER, {"process": 7, "host": host, "token": "x"})


def test_a_silent_writer_elsewhere_is_waited_for_once(quick, tmp_path, caplog):
    """It may have died with its machine, and it may write where the file system shares no locks."""
    foreign(tmp_path)
    caplog.set_level("INFO", "loragen")
    began = time.monotonic()
    lock = RunLock(tmp_path).acquire()
    assert time.monotonic() - began >= 0.4
    assert "was written by process 7 on elsewhere, which has not freed it" in caplog.text
    lock.check()
    lock.release()


def test_a_writer_elsewhere_that_gives_a_sign_keeps_its_run(quick, tmp_path):
    foreign(tmp_path)
    writes = threading.Timer(0.2, os.utime, [tmp_path / WRITER])
    writes.start()
    with pytest.raises(UsageError, match="is being written by process 7 on elsewhere"):
        RunLock(tmp_path).acquire()
    writes.join()
    foreign(tmp_path, socket.gethostname())  # this machine knows by its own lock that it has ended
    RunLock(tmp_path).acquire().release()


def test_a_lock_that_a_server_holds_for_a_dead_machine_is_waited_for(quick, tmp_path):
    from filelock import FileLock

    foreign(tmp_path)
    held = FileLock(tmp_path / LOCK, thread_local=False)
    held.acquire()
    with pytest.raises(UsageError, match="is being written by process 7 on elsewhere"):
        RunLock(tmp_path).acquire()
    frees = threading.Timer(0.3, held.release)
    frees.start()
    RunLock(tmp_path).acquire().release()
    frees.join()


def test_without_locks_of_the_file_system_the_sign_of_life_decides(quick, tmp_path, monkeypatch):
    import errno

    from filelock import FileLock

    def acquire(*_, **__):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", acquire)
    first = RunLock(tmp_path).acquire()
    with pytest.raises(UsageError, match="is being written by process"):
        RunLock(tmp_path).acquire()  # it sees the first one's thread at work
    first.release()
    RunLock(tmp_path).acquire().release()


def test_a_run_that_changed_after_it_was_found_is_not_resumed(collection, tmp_path):
    import shutil

    run = shutil.copytree(collection.runs["colors"], tmp_path / "run")
    point = LoraPoint.find(run)
    manifest = read_manifest(run, LoraManifest)
    write_json(run / "manifest.json", {**manifest.model_dump(), "status": "running"})
    with pytest.raises(UsageError, match="another process has written it just now"):
        point.acquire()
    assert writer_of(run) is None
