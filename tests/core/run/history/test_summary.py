"""A run in one line, from its files as they are."""

import json
import os
import socket

import pytest

from loragen.core.run.history.summary import listed, size_on_disk, summarize
from loragen.core.run.lock import WRITER, RunLock
from tests.made_runs import change_manifest, log, make_run


def seen(run):
    return listed(run, summarize(run))


def test_a_finished_run_with_its_lowest_validation(tmp_path):
    run = seen(make_run(tmp_path, "arc_lora_1", val={4: 0.5, 6: 0.25, 8: 0.75}))
    assert (run.state, run.command, run.datasets) == ("finished", "lora train", ("arc",))
    assert (run.step, run.max_steps) == (8, 8)
    assert (run.metric, run.best, run.best_step) == ("val/loss", 0.25, 6)
    assert run.size == size_on_disk(run.path) > 2000


def test_without_a_validation_it_is_the_last_loss(tmp_path):
    run = seen(make_run(tmp_path, "arc_lora_1", losses=[2.0, 0.1, 0.3]))
    assert (run.step, run.metric, run.best, run.best_step) == (3, "train/loss", 0.3, 3)


def test_a_generator_names_the_metric_that_it_is_chosen_by(tmp_path):
    records = [{"name": "a"}, {"name": "b"}, {"name": "c", "held_out": True}]
    run = make_run(tmp_path, "gen_1", kind="generator", source_records=records, steps=5)
    log(run, [{"step": 5, "val/behaviour": 0.7, "val/mine": 0.2}])
    found = seen(run)
    assert (found.command, found.datasets) == ("gen train", ("a", "b"))
    assert (found.metric, found.best) == ("val/behaviour", 0.7)  # an older manifest names none
    change_manifest(run, selection_metric="val/mine")
    assert (seen(run).metric, seen(run).best) == ("val/mine", 0.2)


@pytest.mark.parametrize(
    ("status", "state"), [("failed", "failed"), ("interrupted", "interrupted")]
)
def test_how_it_ended(tmp_path, status, state):
    assert seen(make_run(tmp_path, "arc_lora_1", status=status)).state == state


def test_a_running_run_has_a_process_that_holds_its_lock(tmp_path):
    run = make_run(tmp_path, "arc_lora_1", status="running")
    assert seen(run).state == "interrupted"  # killed before anything could be written
    lock = RunLock(run).acquire()
    assert seen(run).state == "running"
    assert seen(run).writer == f"process {os.getpid()} on {socket.gethostname()}"
    lock.release()
    assert seen(run).state == "interrupted"


def test_a_killed_process_of_this_machine_is_no_running_one(tmp_path):
    """It has left its record, and a fresh sign of life; the operating system has freed its lock."""
    run = make_run(tmp_path, "arc_lora_1", status="running")
    (run / ".run.lock").touch()
    record = {"process": os.getpid(), "host": socket.gethostname(), "token": "x"}
    (run / WRITER).write_text(json.dumps(record))
    assert seen(run).state == "interrupted"


def test_a_run_of_another_machine_lives_while_it_gives_signs(tmp_path):
    """Where the file system shares no locks."""
    run = make_run(tmp_path, "arc_lora_1", status="running")
    (run / WRITER).write_text(json.dumps({"process": 7, "host": "elsewhere", "token": "x"}))
    assert (seen(run).state, seen(run).writer) == ("running", "process 7 on elsewhere")
    os.utime(run / WRITER, (1.0, 1.0))
    assert seen(run).state == "interrupted"


def test_asking_writes_nothing(tmp_path):
    run = make_run(tmp_path, "arc_lora_1", status="running")
    (run / ".run.lock").touch()
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    seen(run)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "damaged: Expecting property name"),
        ("[1]", "damaged: not the manifest of a run"),
        ('{"kind": "other"}', "damaged: not the manifest of a run"),
        ('{"kind": "lora", "format_version": 9}', "format 9 is newer than this loragen reads (1)"),
    ],
)
def test_a_manifest_that_cannot_be_read_says_why(tmp_path, content, problem):
    run = make_run(tmp_path, "arc_lora_1")
    (run / "manifest.json").write_text(content)
    found = seen(run)
    assert found.state == "unreadable"
    assert found.problem.startswith(problem)


def test_values_of_another_kind_do_no_harm(tmp_path):
    run = make_run(tmp_path, "arc_lora_1", steps=0)
    change_manifest(run, dataset=7, base_model=None, max_steps="many", seconds="x", started=3)
    (run / "metrics.jsonl").write_text('{"step": 1, "train/loss": null}\n{"step": 2, "train/l')
    found = seen(run)
    assert (found.datasets, found.base_model, found.max_steps) == ((), "", 0)
    assert (found.step, found.metric, found.best) == (1, "train/loss", None)


def test_a_file_of_two_names_counts_once_and_a_link_not_at_all(tmp_path):
    (tmp_path / "a").write_bytes(bytes(1000))
    os.link(tmp_path / "a", tmp_path / "b")
    (tmp_path / "folder").symlink_to("/usr")
    assert 1000 <= size_on_disk(tmp_path) < 1100
