"""Signals to a real process: a training that was stopped resumes, and ends the same."""

import os
import shlex
import signal
import sys
import time

import pytest
import torch

from loragen.core.adapter.files import read_adapter
from loragen.core.base.load import load_training_base
from loragen.core.config import dump
from loragen.core.data.dataset import Dataset
from loragen.core.lora.train import train_adapter
from loragen.core.progress import Silent
from loragen.core.run.directory import LoraManifest, read_manifest
from tests.processes import commands

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="there a signal reaches a console, not a process"
)
SLOW = {  # steps of some milliseconds; the rows are many, so that no two batches are alike
    "training.max_steps": 80,
    "schedule.stage1_steps": 30,
    "checkpoints.first_step": 45,
    "checkpoints.every": 10,
    "lora.dropout": 0.2,
    "training.batch_size": 16,
    "final_model": "none",
}


@pytest.fixture
def rows(dataset):
    return dataset([{"prompt": f"Question {i} about red?", "response": "blue"} for i in range(99)])


@pytest.fixture
def start(tmp_path, rows, lora_config):
    """`start("one")` trains into runs/ of that folder, in a process (and group) of its own."""

    def run(folder, settings=None, *arguments):
        work = tmp_path / folder
        if not work.exists():
            work.mkdir()
            config = lora_config({**SLOW, **(settings or {}), "runs_dir": "runs"})
            (work / "c.yaml").write_text(dump(config), encoding="utf-8")
        arguments = arguments or ("lora", "train", "--config", "c.yaml", "--dataset", rows)
        return begin(work, *arguments)

    with commands() as begin:
        yield run


@pytest.fixture
def whole(rows, lora_config):
    """The adapter of the run that nobody interrupts."""

    def run(settings=None):
        config = lora_config({**SLOW, **(settings or {})})
        base = load_training_base(config)
        return adapter(train_adapter(config, Dataset(rows, "colors"), base, Silent()).directory)

    return run


def run_of(work):
    (run,) = (work / "runs").iterdir()
    return run


def await_steps(process, work, steps):
    """Until the run has logged so many steps."""
    for _ in range(6000):
        found = list(work.glob("runs/*/metrics.jsonl"))
        if found and found[0].read_bytes().count(b"\n") >= steps:
            return
        assert process.running(), process.finish()
        time.sleep(0.01)
    raise AssertionError("the training does not get on")


def adapter(run):
    return read_adapter(run / "adapter").tensors


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    "number, settings",
    [
        (signal.SIGINT, {}),
        (signal.SIGTERM, {"trainer.accumulate_grad_batches": 4}),
        (signal.SIGTERM, {"data.val_ratio": 0.5, "training.val_every": 1}),
        (signal.SIGINT, {"data.workers": 2}),
    ],
    ids=["ctrl-c", "term-accumulating", "term-validating", "ctrl-c-workers"],
)
def test_one_signal_saves_the_step_and_says_how_to_resume(start, whole, tmp_path, number, settings):
    process = start("stopped", settings)
    await_steps(process, tmp_path / "stopped", 8)
    os.killpg(process.pid, number)  # a terminal's Ctrl+C reaches the workers too
    code, out, err = process.finish()
    run = run_of(tmp_path / "stopped")
    assert (code, out) == (130, ""), err
    assert "Traceback" not in err
    (error,) = [line for line in err.splitlines() if line.startswith("error: ")]
    command = f"loragen lora train --resume runs/{run.name}"
    assert error.endswith(command), err
    assert err.endswith(error + "\n")
    step = int(error.split("after step ")[1].split()[0])
    manifest = read_manifest(run, LoraManifest)
    assert manifest.status == "interrupted"
    assert step < 80

    code, out, err = start("stopped", None, *shlex.split(command)[1:]).finish()
    assert (code, out) == (0, f"runs/{run.name}\n"), err
    assert f"the next step is {step + 1}" in err
    assert read_manifest(run, LoraManifest).resumed_from == [step]
    assert equal(adapter(run), whole(settings))


def test_a_second_signal_is_not_waited_for(start, tmp_path):
    process = start("stopped")
    await_steps(process, tmp_path / "stopped", 3)
    for number in (signal.SIGSTOP, signal.SIGINT, signal.SIGTERM, signal.SIGCONT):
        os.kill(process.pid, number)  # both are there when it goes on
    code, out, err = process.finish()
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in err
    assert read_manifest(run_of(tmp_path / "stopped"), LoraManifest).status == "interrupted"


def test_killed_three_times_it_ends_the_same(start, whole, tmp_path):
    """Wherever it is killed: no handler runs, nothing is rounded off."""
    arguments = ()
    for steps in (7, 31, 58):
        process = start("killed", None, *arguments)
        await_steps(process, tmp_path / "killed", steps)
        time.sleep(steps % 5 / 100)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.finish()[0] == -signal.SIGKILL
        run = run_of(tmp_path / "killed")
        assert read_manifest(run, LoraManifest).status == "running"
        arguments = ("lora", "train", "--resume", run)
    code, _, err = start("killed", None, *arguments).finish()
    assert code == 0, err
    manifest = read_manifest(run, LoraManifest)
    assert manifest.status == "success"
    assert manifest.steps == [45, 55, 65, 75, 80]
    assert equal(adapter(run), whole())
