"""Following a run that another process writes."""

import shutil

import pytest

from loragen.core.errors import UsageError
from loragen.core.progress import Progress
from loragen.core.run.history import following
from loragen.core.run.history.following import follow
from loragen.core.run.history.listing import find_run
from loragen.core.run.lock import RunLock
from tests.made_runs import change_manifest, log, make_run


class Seen(Progress):
    def __init__(self):
        self.events = []

    def training_started(self, name, total):
        self.events.append(("started", name, total))

    def step(self, step):
        self.events.append(("step", step.position, step.loss, step.unit))

    def validated(self, validation):
        self.events.append(("validated", validation.position, validation.is_best))

    def training_ended(self, name):
        self.events.append(("ended", name))


@pytest.fixture
def acts(monkeypatch):
    """What happens while `follow` waits, one act each time."""
    acts = []
    monkeypatch.setattr(following.time, "sleep", lambda _: acts.pop(0)())
    return acts


def test_it_shows_what_is_logged_until_the_run_ends(tmp_path, acts):
    run = make_run(tmp_path, "arc_lora_1", steps=3, val={2: 0.5}, status="running")
    lock = RunLock(run).acquire()

    def end():
        log(run, [{"step": 8, "train/loss": 0.1}])
        change_manifest(run, status="success")
        lock.release()

    acts += [
        lambda: log(run, [{"step": 4, "train/loss": 0.5, "train/tokens_per_second": 9.0}]),
        lambda: None,
        lambda: log(run, [{"step": 6, "val/loss": 0.25}, {"step": 7, "val/loss": 0.75}]),
        end,
    ]
    seen = Seen()
    assert follow(find_run(str(run)), seen).state == "finished"
    assert seen.events == [
        ("started", "arc_lora_1", 8),
        ("validated", (2, 8), True),
        ("step", (3, 8), 1.0, "steps/s"),
        ("step", (4, 8), 0.5, "answer tokens/s"),
        ("validated", (6, 8), True),
        ("validated", (7, 8), False),
        ("step", (8, 8), 0.1, "steps/s"),
        ("ended", "arc_lora_1"),
    ]


def test_a_process_that_is_killed_ends_it(tmp_path, acts):
    run = make_run(tmp_path, "arc_lora_1", status="running")
    lock = RunLock(run).acquire()
    acts.append(lock.release)
    assert follow(find_run(str(run)), Seen()).state == "interrupted"


def test_a_run_that_has_ended_is_told_at_once(tmp_path, acts):
    run = make_run(tmp_path, "arc_lora_1", status="failed")
    assert follow(find_run(str(run)), Seen()).state == "failed"


def test_a_run_that_is_removed_meanwhile(tmp_path, acts):
    run = make_run(tmp_path, "arc_lora_1", status="running")
    lock = RunLock(run).acquire()
    acts.append(lambda: shutil.rmtree(run))
    with pytest.raises(UsageError, match="was removed"):
        follow(find_run(str(run)), Seen())
    lock.release()
