"""Trainings that are killed at random moments, or whose disk is full at random, and that go on.

Each ends with the files of a training that nobody has disturbed, bit for bit. `make soak` kills
each a hundred times (SOAK=N in the environment), which takes an hour or more; the ordinary tests
leave this module out.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from shutil import rmtree

import pytest

from loragen.core.config import GenTrainConfig, LoraTrainConfig, dump
from loragen.core.run.directory import LoraManifest
from tests.conftest import TINY_LORA, TRANSFER, configured, generator_settings, rows_of
from tests.core.learning.test_resume import assert_equal
from tests.core.run.resuming import assert_same_course
from tests.faults.test_disks import mounted
from tests.processes import commands

TIMES = int(os.environ.get("SOAK", "0"))
LONGEST = 3600
"""Seconds for one training: the machine may be busy."""
pytestmark = [
    pytest.mark.skipif(not TIMES, reason="takes an hour: `make soak`"),
    pytest.mark.skipif(
        sys.platform == "win32", reason="there a signal reaches a console, not a process"
    ),
    pytest.mark.timeout(0),
]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)
TRAININGS = {
    "lora": {
        "training.max_steps": 24,
        "schedule.stage1_steps": 8,
        "checkpoints.first_step": 10,
        "checkpoints.every": 4,
        "checkpoints.last_every": 3,
        "lora.dropout": 0.2,
        "data.val_ratio": 0.2,
        "training.val_every": 6,
    },
    "reconstruction": {
        "training.max_epochs": 8,
        "training.last_every": 3,
        "decoder.dropout": 0.2,
        "data.val_ratio": 0.25,
    },
    "transfer": {**TRANSFER, "behaviour.max_steps": 12, "training.last_every": 3},
}


class Training:
    """A training that is disturbed again and again, and the one that nobody has disturbed."""

    def __init__(self, home, start, command, config, folder):
        self._home, self._start, self._command = home, start, command
        self._config, self._folder = dump(config), folder
        work = self.place()
        began = time.monotonic()
        code, _, err = self.start(work).finish(LONGEST)
        assert code == 0, err
        self.seconds, self.whole = time.monotonic() - began, self.run(work)
        self.lines = self.logged(work)

    def place(self, disk=None):
        """A new working directory, whose runs are written to `disk`."""
        work = self._home / str(len(list(self._home.iterdir())))
        work.mkdir()
        (work / "c.yaml").write_text(self._config, encoding="utf-8")
        if disk:
            (work / self._folder).symlink_to(disk)
        return work

    def run(self, work):
        """The run that has begun there, if any."""
        found = [file.parent for file in work.glob(f"{self._folder}/*/manifest.json")]
        assert len(found) <= 1
        return found[0] if found else None

    def logged(self, work):
        """The number of lines of metrics."""
        run = self.run(work)
        log = run and run / "metrics.jsonl"
        return log.read_bytes().count(b"\n") if log and log.is_file() else 0

    def start(self, work):
        """Begins, or goes on."""
        run = self.run(work)
        how = ("--resume", run) if run else ("--config", "c.yaml", *self._command[2:])
        return self._start(work, *self._command[:2], *how)

    def check(self, work):
        """Goes on to the end, which has to be that of the whole training."""
        code, _, err = self.start(work).finish(LONGEST)
        assert code == 0, err
        run = self.run(work)
        assert not [path for path in work.rglob("*") if path.name.endswith(".unfinished")]
        if self._command[0] == "lora":
            assert_same_course(self.whole, run, LoraManifest)
            for file in (self.whole / "adapter").iterdir():
                if file.suffix != ".md":  # its card has the date
                    assert file.read_bytes() == (run / "adapter" / file.name).read_bytes(), file
        else:
            assert_equal(self.whole, run)
        rmtree(run)  # its streams are read once more in the end


@pytest.fixture
def training(request, collection, sbert_dir, dataset, tmp_path):
    """The training of that name, once it has been done without a disturbance."""
    home = tmp_path / "trainings"
    home.mkdir()
    more = TRAININGS[request.param]
    if request.param == "lora":
        rows = dataset(rows_of(("red", "green", "blue"), count=60))
        ours = {**TINY_LORA, "base_model": str(collection.base), "runs_dir": "runs"}
        command = ("lora", "train", "--dataset", rows)
        config, folder = configured(LoraTrainConfig, {**ours, **more}), "runs"
    else:
        ours = generator_settings(collection, sbert_dir, tmp_path)
        ours |= {"experiments_dir": "experiments", **more}
        command, folder = ("gen", "train"), "experiments"
        config = configured(GenTrainConfig, ours)
    with commands() as start:
        yield Training(home, start, command, config, folder)


def kill(training, work, number, chance):
    """Starts, or goes on, and sends a signal at a random moment: while it starts, between two lines
    of its metrics, or while it writes what remains. Returns the exit code."""
    process = training.start(work)
    if chance.random() < 0.2:
        time.sleep(chance.uniform(0, training.seconds))
    else:
        lines = chance.randint(training.logged(work), training.lines)
        while process.running() and training.logged(work) < lines:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 2 * training.seconds / training.lines))
    if process.running():
        os.killpg(process.pid, number)
    code, _, err = process.finish(LONGEST)
    assert "Traceback" not in err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == (code in (1, 2, 130)), err
    assert code in (0, 130, -number), err
    return code


@pytest.mark.parametrize("training", TRAININGS, indirect=True)
def test_killed_at_any_moment_it_ends_the_same(training, request):
    chance = random.Random(int(os.environ.get("SOAK_SEED", "0")))
    codes, kills = Counter(), 0
    while kills < TIMES:
        work = training.place()
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            number = chance.choice(SIGNALS)
            codes[number.name, kill(training, work, number, chance)] += 1
            kills += 1
        training.check(work)
        print(request.node.name, kills, "kills", dict(codes), flush=True)


@pytest.mark.parametrize("training", TRAININGS, indirect=True)
def test_on_a_disk_that_is_full_at_any_moment_it_ends_the_same(training, request, tmp_path):
    chance = random.Random(int(os.environ.get("SOAK_SEED", "0")))
    needed = sum(path.stat().st_size for path in training.whole.rglob("*")) // 1024
    said = Counter()
    for number in range(-(-TIMES // 5)):
        size = chance.randint(16, needed)
        with mounted(tmp_path / "disk", "-o", f"size={size}k") as disk:
            work = training.place(disk)
            code, _, err = training.start(work).finish(LONGEST)
            errors = [line for line in err.splitlines() if line.startswith("error: ")]
            assert "Traceback" not in err
            assert code in (0, 1, 2), err
            assert len(errors) == (code != 0), err
            assert all("No space left on device" in line for line in errors), err
            said[code, errors[0].rpartition(": ")[2] if errors else ""] += 1
            subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
            training.check(work)
        print(request.node.name, number + 1, "full disks", dict(said), flush=True)
