import json
import shutil
from pathlib import Path, PureWindowsPath

import pytest

from loragen.cli.data import parse_position
from loragen.core.data.batches import batch_indices
from loragen.core.errors import UsageError
from loragen.core.run.directory import MANIFEST
from tests.processes import run_in_turn


@pytest.fixture
def run(collection):
    return collection.runs["colors"]


@pytest.fixture
def file(collection):
    return collection.file("colors")


@pytest.fixture
def stopped(run, tmp_path):
    """A copy of the run, killed after step 6: its manifest never knew of any step."""
    copy = shutil.copytree(run, tmp_path / "stopped")
    for step in (7, 8):
        (copy / "checkpoints" / f"checkpoint-step-00{step}.ckpt").unlink()
    lines = (copy / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    kept = "".join(line for line in lines if json.loads(line)["step"] <= 6)
    (copy / "metrics.jsonl").write_text(kept, encoding="utf-8")
    manifest = json.loads((copy / MANIFEST).read_text(encoding="utf-8"))
    manifest |= {"status": "running", "steps": []}
    (copy / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return copy


def steps_with(line, steps=8):
    """What the fixture's run of 16 rows, 4 a step, seed 42 has to answer."""
    return [s for s in range(1, steps + 1) if line - 1 in batch_indices(16, 4, 42, s - 1)]


class TestUses:
    def test_the_steps_and_checkpoints_of_every_line(self, loragen, run, file):
        for line in (1, 7, 16):
            result = loragen("data", "uses", f"{file}:{line}", "--run", run, "--json")
            assert result.exit_code == 0, result.output
            document = json.loads(result.stdout)
            steps = steps_with(line)
            assert [use["step"] for use in document["steps"]] == steps
            assert [use["stage"] for use in document["steps"]] == [1 + (s > 4) for s in steps]
            names = [f"checkpoint-step-00{s}.ckpt" for s in steps if s >= 5]
            assert document["checkpoints"] == names
            assert document["prompt"] == f"Question {line - 1} about red?"
            assert document["held_out"] is False

    def test_as_text(self, loragen, run, file):
        result = loragen("data", "uses", f"{file}:3", "--run", run)
        assert result.exit_code == 0, result.output
        first, second = steps_with(3)
        lines = result.stdout.splitlines()
        assert lines[0].startswith(f"{file}:3 (")
        assert lines[0].endswith(")  Question 2 about red?")
        assert lines[1:] == [
            f"stage 1: step {first}",
            f"stage 2: step {second}",
            f"checkpoints of these steps: checkpoint-step-00{second}.ckpt",
            "(8 of 8 steps done)",
        ]

    def test_a_step_that_a_stopped_run_did_not_reach_is_not_claimed(self, loragen, stopped, file):
        (line,) = [n for n in range(1, 17) if steps_with(n, 6) != steps_with(n)][:1]
        result = loragen("data", "uses", f"{file}:{line}", "--run", stopped, "--json")
        document = json.loads(result.stdout)
        assert [use["step"] for use in document["steps"]] == steps_with(line, 6)
        assert (document["done_steps"], document["planned_steps"]) == (6, 8)
        assert document["checkpoints"] == []

    def test_a_row_that_was_not_reached(self, loragen, train_lora, dataset):
        file = dataset()
        run = train_lora({"training.max_steps": 1, "checkpoints.first_step": 1}, file=file)
        first = batch_indices(12, 4, 42, 0)
        line = next(n for n in range(1, 13) if n - 1 not in first)
        result = loragen("data", "uses", f"{file}:{line}", "--run", run.directory)
        assert result.stdout.endswith("not trained on so far (1 of 1 steps done)\n")

    def test_a_row_held_out_for_validation(self, loragen, train_lora, dataset):
        file = dataset()
        run = train_lora({"data.val_ratio": 0.25, "training.max_steps": 6}, file=file).directory
        documents = [
            json.loads(loragen("data", "uses", f"{file}:{n}", "--run", run, "--json").stdout)
            for n in range(1, 13)
        ]
        assert sum(document["held_out"] for document in documents) == 3
        assert all(document["held_out"] == (not document["steps"]) for document in documents)
        held = next(document["line"] for document in documents if document["held_out"])
        result = loragen("data", "uses", f"{file}:{held}", "--run", run)
        assert "held out for validation: the run was never trained on it" in result.stdout

    def test_a_copy_of_the_data_will_do_even_where_they_are_gone(
        self, loragen, train_lora, dataset, tmp_path
    ):
        run = train_lora(file=dataset()).directory
        copy = shutil.move(tmp_path / "colors.jsonl", tmp_path / "else.jsonl")
        result = loragen("data", "uses", f"{copy}:2", "--run", run, "--json")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["file"] == str(copy)

    def test_another_file_is_refused(self, fails, run, collection):
        other = collection.file("animals")
        error = fails(1, "data", "uses", f"{other}:2", "--run", run)
        assert error == (
            f"{other}: {run} was trained on other rows, those of {collection.file('colors')}"
        )

    def test_the_run_s_own_file_that_has_changed_is_refused(self, fails, train_lora, dataset):
        file = dataset()
        run = train_lora(file=file).directory
        file.write_text(file.read_text(encoding="utf-8").upper(), encoding="utf-8")
        error = fails(1, "data", "uses", f"{file}:2", "--run", run)
        assert error == f"{file} has changed since {run} was trained on it"

    @pytest.mark.parametrize(
        "place, message",
        [
            ("{file}:17", "{file}:17: no row; the file has 16 rows"),
            ("{file}", "{file}: expected FILE:LINE, as in train.jsonl:12"),
            ("{file}:0", "{file}:0: expected FILE:LINE, as in train.jsonl:12"),
            ("none.jsonl:3", "none.jsonl: no such file"),
        ],
    )
    def test_what_is_no_row_is_a_usage_error(self, fails, run, file, place, message):
        error = fails(2, "data", "uses", place.format(file=file), "--run", run)
        assert error == message.format(file=file)

    def test_a_run_that_is_not_there(self, fails, file):
        error = fails(2, "data", "uses", f"{file}:1", "--run", "none")
        assert error.startswith("none: neither a run directory nor inside one")


@pytest.mark.parametrize(
    "place, file, line",
    [
        (r"C:\data\x.jsonl:12", r"C:\data\x.jsonl", 12),
        ("C:/data/x.jsonl:1", "C:/data/x.jsonl", 1),
        ("a:b.jsonl:3", "a:b.jsonl", 3),
    ],
)
def test_the_last_colon_is_the_border(place, file, line):
    assert parse_position(place) == (Path(file), line)


@pytest.mark.parametrize("place", [str(PureWindowsPath("C:/x.jsonl")), ":3", "x.jsonl:", "x:²"])
def test_what_has_no_line_is_refused(place):
    with pytest.raises(UsageError, match="expected FILE:LINE"):
        parse_position(place)


class TestLines:
    def test_the_rows_of_a_checkpoint(self, loragen, run, file):
        path = run / "checkpoints" / "checkpoint-step-006.ckpt"
        result = loragen("ckpt", "lines", path, "--json")
        assert result.exit_code == 0, result.output
        document = json.loads(result.stdout)
        assert document["file"] == str(file)
        assert (document["step"], document["stage"]) == (6, 2)
        assert document["learning_rate"] == 1e-3
        lines = [row["line"] for row in document["rows"]]
        assert lines == [index + 1 for index in batch_indices(16, 4, 42, 5)]
        assert [row["prompt"] for row in document["rows"]] == [
            f"Question {line - 1} about red?" for line in lines
        ]
        assert {len(row["hash"]) for row in document["rows"]} == {16}

    def test_any_step_of_a_run_kept_or_not(self, loragen, run):
        result = loragen("ckpt", "lines", run, "--step", 2)
        assert result.exit_code == 0, result.output
        head, rows = result.stdout.split("\n\n")
        assert head.splitlines()[1] == "step 2, stage 1, learning rate 0.01"
        numbers = [int(line.split()[0]) for line in rows.splitlines()[1:]]
        assert numbers == [index + 1 for index in batch_indices(16, 4, 42, 1)]

    def test_last_ckpt_knows_its_step(self, loragen, run, tmp_path):
        copy = shutil.copytree(run, tmp_path / "copy")
        folder = copy / "checkpoints"
        shutil.copy(folder / "checkpoint-step-007.ckpt", folder / "last.ckpt")
        result = loragen("ckpt", "lines", folder / "last.ckpt", "--json")
        assert json.loads(result.stdout)["step"] == 7

    def test_a_long_prompt_is_cut_to_one_line(self, loragen, train_lora, dataset):
        file = dataset([{"prompt": "many\nlines " * 30, "response": "red"}])
        run = train_lora({"data.max_length": 400}, file=file).directory
        document = json.loads(loragen("ckpt", "lines", run, "--step", 1, "--json").stdout)
        (prompt,) = {row["prompt"] for row in document["rows"]}
        assert len(prompt) == 60
        assert prompt.startswith("many lines many")
        assert prompt.endswith("…")

    @pytest.mark.parametrize(
        "part, more, message",
        [
            ("", (), "which step? Name a checkpoint of the run, or give --step N"),
            ("adapter", (), "which step? Name a checkpoint of the run, or give --step N"),
            ("", ("--step", 9), "has no step 9: it has done 8"),
            ("checkpoints/checkpoint-step-003.ckpt", (), "no such run or checkpoint; --step N"),
        ],
    )
    def test_a_step_that_is_not_there_is_a_usage_error(self, fails, run, part, more, message):
        assert message in fails(2, "ckpt", "lines", run / part, *more)

    def test_steps_that_a_stopped_run_did_not_do_are_not_claimed(self, fails, stopped):
        error = fails(2, "ckpt", "lines", stopped, "--step", 7)
        assert error == f"{stopped} has no step 7: it has done 6"

    def test_a_checkpoint_outside_a_run_is_a_usage_error(self, fails, run):
        shutil.copy(run / "checkpoints" / "checkpoint-step-006.ckpt", fails.loragen.work / "x.ckpt")
        assert "neither a run directory nor inside one" in fails(2, "ckpt", "lines", "x.ckpt")


def test_both_answer_without_anything_heavy(run, file):
    """From (seed, step) alone: no torch, no model."""
    uses = ["data", "uses", f"{file}:2", "--run", run]
    lines = ["ckpt", "lines", run / "checkpoints" / "checkpoint-step-006.ckpt"]
    for command, (code, out, err, heavy) in run_in_turn([uses, lines]):
        assert (code, err, heavy) == (0, "", []), command
        assert out, command
