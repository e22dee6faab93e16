"""`loragen runs`, on directories that no training has made."""

import io
import json
import sys

import pytest
from typer.testing import CliRunner

from loragen.cli import curves, runs
from loragen.cli.main import app
from loragen.core.run.lock import RunLock
from tests.made_runs import CONFIG, make_run


@pytest.fixture
def made(loragen):
    """Two runs of lora train and one of gen train, in the usual folders."""
    make_run(
        loragen.work / "runs",
        "arc_lora_1",
        losses=[3.0, 2.0, 1.0],
        val={2: 0.5, 3: 0.25},
        started="2026-01-02T00:00:00+00:00",
    )
    make_run(
        loragen.work / "runs",
        "boolq_lora_1",
        losses=[3.0, 2.5],
        status="failed",
        base_model="/models/Qwen2.5-0.5B",
        settings=CONFIG.replace("16", "32"),
        started="2026-01-03T00:00:00+00:00",
        files=["checkpoints/last.ckpt"],
    )
    make_run(
        loragen.work / "experiments",
        "lora_generator_1",
        kind="generator",
        source_records=[{"name": "arc"}, {"name": "boolq"}],
        started="2026-01-01T00:00:00+00:00",
    )
    return loragen


def listed(loragen, *arguments):
    result = loragen("runs", "list", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return [run["name"] for run in json.loads(result.stdout)["runs"]]


class TestList:
    def test_a_table(self, made):
        result = made("runs", "list")
        assert result.exit_code == 0, result.output
        assert result.stderr == ""
        header, *lines = result.stdout.splitlines()
        assert header.split() == [
            *("name", "state", "command", "dataset", "base", "steps", "best", "metric"),
            *("size", "age"),
        ]
        assert [line.split()[0] for line in lines] == [
            "boolq_lora_1",
            "arc_lora_1",
            "lora_generator_1",
        ]
        assert "failed" in lines[0] and "Qwen2.5-0.5B " in lines[0]
        assert lines[1].split()[5:9] == ["demo", "3/8", "0.25", "val/loss"]
        assert "2 datasets" in lines[2]

    def test_what_a_program_gets(self, made):
        result = made("runs", "list", "runs", "--json")
        (_, run) = json.loads(result.stdout)["runs"]
        assert run.pop("age_seconds") > 0
        assert run.pop("size_bytes") > 2000
        assert run == {
            "name": "arc_lora_1",
            "path": "runs/arc_lora_1",
            "state": "finished",
            "writer": None,
            "command": "lora train",
            "status": "success",
            "started": "2026-01-02T00:00:00+00:00",
            "seconds": 60.0,
            "datasets": ["arc"],
            "base_model": "demo",
            "step": 3,
            "max_steps": 8,
            "metric": "val/loss",
            "best": 0.25,
            "best_step": 3,
            "problem": None,
        }

    @pytest.mark.parametrize(
        ("options", "names"),
        [
            (["--state", "failed"], ["boolq_lora_1"]),
            (["--state", "failed", "--state", "finished", "runs"], ["boolq_lora_1", "arc_lora_1"]),
            (["--dataset", "arc"], ["arc_lora_1", "lora_generator_1"]),
            (["--dataset", "b*", "--command", "lora"], ["boolq_lora_1"]),
            (["--command", "gen"], ["lora_generator_1"]),
            (["--base", "Qwen*"], ["boolq_lora_1"]),
            (["--base", "/models/*"], ["boolq_lora_1"]),
            (["--sort", "name"], ["arc_lora_1", "boolq_lora_1", "lora_generator_1"]),
            (["--sort", "best", "runs"], ["boolq_lora_1", "arc_lora_1"]),
            (["--sort", "steps", "-r"], ["boolq_lora_1", "arc_lora_1", "lora_generator_1"]),
            (["--limit", "1"], ["boolq_lora_1"]),
            (["--reverse", "-n", "1"], ["lora_generator_1"]),
        ],
    )
    def test_filters_and_orders(self, made, options, names):
        assert listed(made, *options) == names

    def test_no_runs(self, loragen, made, fails):
        result = loragen("runs", "list", "--dataset", "piqa")
        assert (result.exit_code, result.stdout) == (0, "")
        assert result.stderr == "runs and experiments: no runs there of that kind\n"
        assert listed(loragen, "--dataset", "piqa") == []
        assert fails(2, "runs", "list", "nowhere") == "nowhere: no such directory"

    def test_a_damaged_run_is_listed_as_such(self, made):
        (made.work / "runs" / "arc_lora_1" / "manifest.json").write_text("{")
        result = made("runs", "list", "runs")
        assert "arc_lora_1    unreadable" in result.stdout
        assert "runs/arc_lora_1: its manifest is damaged: Expecting" in result.stderr

    @pytest.mark.parametrize("columns", [60, 80, 140])
    def test_a_narrow_terminal_has_fewer_columns(self, made, monkeypatch, columns):
        monkeypatch.setattr(runs.sys, "stdout", _Terminal())
        monkeypatch.setenv("COLUMNS", str(columns))
        found = runs_of(made)
        header, *lines = runs._table(found).splitlines()
        assert max(map(len, lines)) <= columns
        assert header.split()[:2] == ["name", "state"]
        assert ("dataset" in header) == (columns == 140)


def runs_of(loragen):
    from loragen.core.run.history.listing import list_runs

    return list_runs([loragen.work / "runs"])


class _Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


class TestShow:
    def test_a_run(self, made):
        result = made("runs", "show", "arc_lora_1")
        assert result.exit_code == 0, result.output
        assert "  steps      3/8\n" in result.stdout
        assert "train/loss     1       1        3" in result.stdout
        assert "base_model           demo" in result.stdout  # what is not the default
        assert "training.batch_size" in result.stdout
        assert "val/loss\n" in result.stdout  # a chart

    def test_what_a_program_gets(self, made):
        found = json.loads(made("runs", "show", "runs/arc_lora_1", "--json").stdout)
        assert found["manifest"]["kind"] == "lora"
        assert found["metrics"]["val/loss"] == {
            "last": 0.25,
            "lowest": 0.25,
            "lowest_step": 3,
            "steps": [2, 3],
            "values": [0.5, 0.25],
        }
        assert found["settings"]["training.max_steps"] == 8

    def test_an_interrupted_run_says_how_it_goes_on(self, made):
        run = make_run(made.work / "runs", "piqa_lora_1", status="running")
        result = made("runs", "show", "piqa_lora_1")
        assert "state      interrupted" in result.stdout
        assert f"loragen lora train --resume {run.relative_to(made.work)}" in result.stdout

    def test_no_such_run(self, made, fails):
        assert fails(2, "runs", "show", "ark_lora_1") == (
            "ark_lora_1: no such run. Did you mean 'arc_lora_1'?"
        )


class TestCompare:
    def test_two_runs(self, made):
        result = made("runs", "compare", "arc_lora_1", "boolq_lora_1")
        assert result.exit_code == 0, result.output
        assert "A  arc_lora_1    finished  3/8" in result.stdout
        assert "training.batch_size  16  32" in result.stdout
        assert "seed" not in result.stdout  # the same in both
        (losses,) = [line for line in result.stdout.splitlines() if "1 @ 3, 1" in line]
        assert losses.split() == ["train/loss", "1", "@", "3,", "1", "2.5", "@", "2,", "2.5"]
        assert "++ A   xx B" in result.stdout  # signs, where no colour tells them apart

    def test_what_a_program_gets(self, made):
        arguments = ("runs", "compare", "arc_lora_1", "boolq_lora_1", "-m", "train/loss", "--json")
        found = json.loads(made(*arguments).stdout)
        assert found["differences"]["training.batch_size"] == [16, 32]
        assert [run["metrics"]["train/loss"]["steps"] for run in found["runs"]] == [
            [1, 2, 3],
            [1, 2],
        ]

    def test_one_run_is_not_enough(self, made, fails):
        assert "needs two runs" in fails(2, "runs", "compare", "arc_lora_1", "arc_lora_1")


class TestWatch:
    def test_a_run_that_has_ended(self, made):
        result = made("runs", "watch", "arc_lora_1")
        assert result.exit_code == 0, result.output
        assert "arc_lora_1: stage 1, step 3/8, loss 1.0000" in result.stderr
        assert "validated after training, step 3/8: val/loss 0.2500; the best so far" in (
            result.stderr
        )
        assert "arc_lora_1  finished" in result.stdout
        assert made("runs", "watch", "boolq_lora_1").exit_code == 1
        found = json.loads(made("runs", "watch", "arc_lora_1", "--json").stdout)
        assert found["state"] == "finished"

    def test_the_newest_that_is_running(self, made, monkeypatch):
        run = make_run(made.work / "runs", "piqa_lora_1", status="running")
        lock = RunLock(run).acquire()
        monkeypatch.setattr("loragen.core.run.history.following.time.sleep", _interrupt)
        result = made("runs", "watch")
        lock.release()
        assert (result.exit_code, result.stdout) == (130, "")
        assert result.stderr.startswith("piqa_lora_1: stage 1, step 8/8")
        assert "interrupted" not in result.stderr  # Ctrl+C leaves quietly

    def test_none_is_running(self, made, fails):
        assert "no run is running" in fails(2, "runs", "watch")


def _interrupt(_):
    raise KeyboardInterrupt


class TestRemove:
    def test_a_run_and_nothing_else(self, made):
        result = made("runs", "rm", "arc_lora_1", "--yes")
        assert result.exit_code == 0, result.output
        assert result.stderr.startswith("runs/arc_lora_1: 5 files, ")
        assert result.stdout.endswith(" kB freed\n")
        assert listed(made) == ["boolq_lora_1", "lora_generator_1"]
        assert not (made.work / "runs" / "arc_lora_1").exists()

    def test_it_asks_and_is_refused_where_nobody_answers(self, made, fails):
        found = fails(2, "runs", "rm", "arc_lora_1", "boolq_lora_1")
        assert found.startswith("Remove 2 runs, ")
        assert found.endswith("? Nobody can be asked here: add --yes")

    @pytest.mark.parametrize(("answer", "gone"), [("y\n", True), ("n\n", False)])
    def test_it_asks_on_a_terminal(self, made, monkeypatch, answer, gone):
        monkeypatch.setattr(runs, "_can_ask", lambda: True)
        result = CliRunner().invoke(app, ["runs", "rm", "arc_lora_1"], input=answer)
        assert "Remove 1 run, " in result.stderr
        assert result.exit_code == (0 if gone else 1)
        assert (made.work / "runs" / "arc_lora_1").exists() != gone

    def test_checkpoints_alone(self, made):
        result = made("runs", "rm", "arc_lora_1", "--checkpoints", "--yes", "--json")
        found = json.loads(result.stdout)
        assert (found["removed"], found["size_bytes"]) == (True, 1000)
        assert result.stderr == ""
        left = [path.name for path in (made.work / "runs/arc_lora_1/checkpoints").iterdir()]
        assert left == ["checkpoint-step-008.ckpt"]

    def test_a_dry_run_removes_nothing(self, made):
        (made.work / "runs" / "arc_lora_1" / "notes.txt").write_text("mine")
        before = sorted((made.work / "runs").rglob("*"))
        result = made("runs", "rm", "arc_lora_1", "--dry-run")
        assert "would be freed" in result.stdout
        assert "runs/arc_lora_1/notes.txt stays: loragen has not written it" in result.stderr
        assert sorted((made.work / "runs").rglob("*")) == before

    def test_a_running_one_is_refused_before_any_is_removed(self, made):
        run = make_run(made.work / "runs", "piqa_lora_1", status="running")
        lock = RunLock(run).acquire()
        result = made("runs", "rm", "arc_lora_1", "piqa_lora_1", "--yes")
        lock.release()
        assert result.exit_code == 2
        assert "is being written by process" in result.stderr
        assert (made.work / "runs" / "arc_lora_1" / "manifest.json").exists()


CURVES = {
    "train/loss": {"A": ([1, 2, 3], [3.0, 2.0, 1.0]), "B": ([1, 3], [2.0, 2.0])},
    "val/loss": {"A": ([1, 2], [1.0, 0.5])},
}


class TestCurves:
    @pytest.mark.parametrize(("width", "beside"), [(80, False), (140, True)])
    def test_charts_stand_side_by_side_where_there_is_room(self, width, beside):
        text = curves.charts(CURVES, width)
        lines = text.splitlines()
        assert max(map(len, lines)) <= width
        assert any("train/loss" in line and "val/loss" in line for line in lines) == beside

    def test_without_unicode_they_are_ascii(self, monkeypatch):
        monkeypatch.setattr(curves.sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
        assert curves.charts(CURVES, 140).isascii()
        monkeypatch.undo()
        assert not curves.charts({"a": {"A": ([1, 2], [0.0, 1.0])}}, 80).isascii() or (
            not sys.stdout.encoding.lower().startswith("utf")
        )

    def test_values_that_are_all_the_same(self):
        assert "a" in curves.charts({"a": {"A": ([1, 2], [1.0, 1.0])}}, 80)
