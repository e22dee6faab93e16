"""Folders of runs, and the index that makes the second look at them a quick one."""

import json
import os
import shutil
import threading

import pytest

from loragen.core.errors import UsageError
from loragen.core.run.history import listing
from loragen.core.run.history.listing import INDEX, find_run, list_runs
from tests.made_runs import aged, change_manifest, log, make_run


@pytest.fixture
def reads(monkeypatch):
    """The names of the runs whose files are read."""
    names, summarize = [], listing.summarize

    def counted(path):
        names.append(path.name)
        return summarize(path)

    monkeypatch.setattr(listing, "summarize", counted)
    return names


@pytest.fixture
def folder(tmp_path):
    for name in ("a_1", "b_1", "c_1"):
        make_run(tmp_path / "runs", name)
    aged(tmp_path / "runs")
    return tmp_path / "runs"


def names(folder):
    return [run.name for run in list_runs([folder])]


def test_a_second_listing_reads_no_run(folder, reads):
    first = list_runs([folder])
    assert reads == ["a_1", "b_1", "c_1"]
    assert [run.name for run in first] == reads
    assert list_runs([folder]) == first
    assert len(reads) == 3


def test_the_index_may_be_deleted_or_damaged(folder, reads):
    first = list_runs([folder])
    content = (folder / INDEX).read_bytes()
    for damage in (None, b"", content[:-9], content.replace(b"a_1", b"x_1"), b"\xff" * 99):
        (folder / INDEX).unlink()
        if damage is not None:
            (folder / INDEX).write_bytes(damage)
        assert list_runs([folder]) == first
        assert (folder / INDEX).read_bytes() == content
    assert len(reads) == 3 * 6


def test_a_copied_run_appears_and_a_removed_one_vanishes(folder, reads):
    names(folder)
    shutil.copytree(folder / "a_1", folder / "d_1")
    shutil.rmtree(folder / "b_1")
    assert names(folder) == ["a_1", "c_1", "d_1"]
    assert reads[3:] == ["d_1"]


def test_a_folder_that_was_moved_keeps_its_index(folder, reads):
    names(folder)
    folder.rename(folder.with_name("moved"))
    (run, *_) = list_runs([folder.with_name("moved")])
    assert run.path == folder.with_name("moved") / "a_1"
    assert len(reads) == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda run: change_manifest(run, status="failed"),
        lambda run: log(run, [{"step": 9, "train/loss": 0.5}]),
        lambda run: (run / "checkpoints" / "checkpoint-step-007.ckpt").unlink(),
        lambda run: (run / "notes.txt").write_text("mine"),
    ],
)
def test_a_change_of_a_run_is_seen(folder, reads, change):
    before = list_runs([folder])
    change(folder / "b_1")
    after = list_runs([folder])
    assert reads[3:] == ["b_1"]
    assert [one == other for one, other in zip(before, after, strict=True)] == [True, False, True]


def test_what_has_changed_just_now_is_not_kept(folder, reads):
    """Another change within the same tick of the clock would not show."""
    change_manifest(folder / "b_1", status="failed")
    names(folder)
    names(folder)
    assert reads[3:] == ["b_1"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_needs_none(folder, reads):
    folder.chmod(0o555)
    try:
        assert names(folder) == names(folder) == ["a_1", "b_1", "c_1"]
    finally:
        folder.chmod(0o755)
    assert len(reads) == 6


def test_an_index_that_cannot_be_written_is_none(folder, reads, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(listing, "written_atomically", refuse)
    assert names(folder) == names(folder) == ["a_1", "b_1", "c_1"]
    assert not (folder / INDEX).exists()


def test_several_write_it_at_once(folder):
    wrong = []

    def list_often():
        for _ in range(20):
            (folder / INDEX).unlink(missing_ok=True)
            if names(folder) != ["a_1", "b_1", "c_1"]:
                wrong.append(1)

    threads = [threading.Thread(target=list_often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert names(folder) == ["a_1", "b_1", "c_1"]
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == [INDEX]


def test_what_is_no_run_is_passed_over(folder):
    (folder / "notes").mkdir()
    (folder / "file.txt").touch()
    (folder / "link").symlink_to("nowhere")
    assert names(folder) == ["a_1", "b_1", "c_1"]
    assert names(folder / "nothing") == []
    assert names(folder / "b_1") == ["b_1"]


def test_many_unknown_runs_are_read_by_several_threads(tmp_path):
    for i in range(40):
        make_run(tmp_path, f"a_{i:02}")
    assert names(tmp_path) == [f"a_{i:02}" for i in range(40)]


def test_a_run_by_its_path_or_its_name(folder, monkeypatch):
    assert find_run(str(folder / "b_1")).name == "b_1"
    monkeypatch.chdir(folder.parent)
    assert find_run("b_1").path.as_posix() == "runs/b_1"
    with pytest.raises(UsageError, match=r"^b_2: no such run. Did you mean '[abc]_1'\?$"):
        find_run("b_2")
    with pytest.raises(UsageError, match=r"is a folder of 3 runs; name one: .*c_1"):
        find_run("runs")
    with pytest.raises(UsageError, match="not a run directory"):
        find_run("runs/a_1/checkpoints")


def test_the_folders_by_the_environment(folder, monkeypatch):
    monkeypatch.setenv("LORAGEN_EXPERIMENTS_DIR", str(folder))
    assert find_run("a_1").path == folder / "a_1"
    assert json.dumps(find_run("a_1").document())
