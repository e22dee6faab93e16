"""`loragen data`."""

import json
import shutil
from pathlib import Path, PureWindowsPath

import pytest

from loragen.cli import render
from loragen.cli.data import parse_position
from loragen.core.data.batches import batch_indices
from loragen.core.errors import UsageError

BAD = {"prompt": "p"}


GOOD = {"prompt": "Question?", "response": "red"}


@pytest.fixture
def preview(loragen, base_dir):
    """`preview(source, ...)` with the tiny base's tokenizer."""

    def run(source, *arguments):
        return loragen("data", "preview", source, "--base-model", base_dir, *arguments)

    return run


@pytest.fixture
def prepare(loragen, dataset):
    return lambda *arguments: loragen("data", "prepare", "--source", dataset(), *arguments)


def steps_with(line, steps=8):
    """What the fixture's run of 16 rows, 4 a step, seed 42 has to answer."""
    return [s for s in range(1, steps + 1) if line - 1 in batch_indices(16, 4, 42, s - 1)]


class TestPreview:
    def test_the_mask_and_the_numbers_are_shown(self, preview, dataset):
        result = preview(dataset(), "--limit", "2")
        assert result.exit_code == 0, result.output
        assert result.stderr == ""
        assert "format         prompt/response\n" in result.stdout
        assert "rows           12\n" in result.stdout
        assert "cut            none (max_length 1024)" in result.stdout
        assert "<|user|>Question 0 about red?<|assistant|>⟦red<|end|>⟧" in result.stdout
        assert result.stdout.count("⟦") == 3  # the legend and two rows

    def test_what_is_cut_is_marked(self, preview, dataset):
        result = preview(dataset([GOOD | {"prompt": "x" * 30}]), "--max-length", "20")
        assert "cut            1 rows, " in result.stdout
        assert f"<|user|>{'x' * 8}⟪{'x' * 14}⟫{'x' * 8}<|assistant|>" in result.stdout
        assert "x⟫x" in result.stdout

    def test_json_is_one_document(self, preview, dataset):
        document = json.loads(preview(dataset(), "--json", "--limit", "1").stdout)
        assert document["formats"] == {"prompt/response": 12}
        assert document["bad_rows"] == []
        assert document["row_tokens"].keys() == {"p5", "p50", "p95", "max"}
        assert document["samples"] == [
            {
                "line": 1,
                "cut": "",
                "prompt": "<|user|>Question 0 about red?<|assistant|>",
                "answer": "red<|end|>",
            }
        ]

    def test_several_formats_are_counted(self, preview, dataset):
        other = {"instruction": "a", "output": "b"}
        result = preview(dataset([GOOD, other, GOOD]))
        assert "prompt/response (2), instruction/output[/input] (1)" in result.stdout

    def test_the_shipped_base_will_do(self, loragen, dataset):
        result = loragen("data", "preview", dataset([GOOD]), "--base-model", "demo")
        assert result.exit_code == 0, result.output

    @pytest.mark.parametrize("json_flag", [(), ("--json",)])
    def test_bad_rows_are_shown_and_fail_unless_they_are_to_be_skipped(
        self, preview, dataset, json_flag
    ):
        file = dataset([GOOD, BAD, GOOD, 3])
        result = preview(file, *json_flag)
        assert result.exit_code == 1
        assert result.stderr.startswith(f"error: {file}: 2 bad rows")
        assert result.stderr.count("\n") == 1
        if json_flag:
            bad = json.loads(result.stdout)["bad_rows"]
            assert bad == [
                {"line": 2, "reason": "'response' is missing (keys here: prompt)"},
                {"line": 4, "reason": "expected an object, found int 3"},
            ]
        else:
            assert "  line 4: expected an object, found int 3\n" in result.stdout
        result = preview(file, "--skip-bad-rows", *json_flag)
        assert (result.exit_code, result.stderr) == (0, "")

    def test_a_file_without_good_rows_is_one_line(self, fails, dataset):
        error = fails(1, "data", "preview", dataset([BAD]))
        assert "colors.jsonl:1: 'response'" in error

    @pytest.mark.parametrize(
        "source, message",
        [
            ("none.csv", "none.csv: no such file"),
            ("hub:none", "hub:owner/name"),
            ("nothing", "--data-root"),
        ],
    )
    def test_a_source_that_is_not_there_is_a_usage_error(self, fails, source, message):
        assert message in fails(2, "data", "preview", source)

    def test_a_bare_hub_id_says_why_the_hub_is_asked(self, loragen):
        pytest.importorskip("datasets")
        result = loragen("data", "preview", "no-one/none")
        assert result.exit_code == 2
        note, error = result.stderr.splitlines()
        assert note.startswith("no-one/none: ")
        assert error.startswith("error: hub dataset no-one/none: ")

    def test_a_base_that_is_not_there_is_a_usage_error(self, fails, dataset):
        error = fails(2, "data", "preview", dataset(), "--base-model", "./none")
        assert "./none: no such directory" in error

    def test_it_only_reads(self, preview, dataset, tmp_path):
        file = dataset()
        before = sorted(tmp_path.rglob("*"))
        preview(file)
        assert sorted(tmp_path.rglob("*")) == before

    def test_a_terminal_shows_colours_and_obeys_no_escapes_of_the_data(self, monkeypatch):
        monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
        monkeypatch.delenv("NO_COLOR", raising=False)
        assert render.highlighted("a\x1b[0m", "good") == "\x1b[32m\x1b[1ma\\x1b[0m\x1b[0m"
        assert render.highlighted("a", "dropped") == "\x1b[2m\x1b[9ma\x1b[0m"
        monkeypatch.setenv("NO_COLOR", "1")
        assert render.highlighted("a", "good") == "⟦a⟧"
        assert render.visible("猫\u3000\n\t\r") == "猫\u3000\n\t\\x0d"

    def test_the_help_shows_the_whole_form_of_a_hub_dataset(self, loragen, monkeypatch):
        """What is in brackets is not taken for markup."""
        monkeypatch.setenv("COLUMNS", "200")
        help_text = loragen("data", "preview", "--help").output
        assert "hub:owner/name[:config][@split]" in help_text


class TestPrepare:
    def test_the_originals_spelling(self, prepare, loragen):
        result = prepare("--output_dir", "p", "--samples_per_prompt", "2", "--test_ratio", "0.5")
        assert (result.exit_code, result.stderr) == (0, "")
        assert result.stdout == (
            "dataset  prompts  repeated  left over  train texts  val texts\n"
            "colors        12         0          0            3          3\n"
        )
        assert {file.name for file in (loragen.work / "p").iterdir()} == {
            "train_prompts.jsonl",
            "val_prompts.jsonl",
            "prepared.json",
        }

    def test_json_is_one_document(self, prepare):
        document = json.loads(prepare("--output", "p", "--json").stdout)
        assert (document["output_dir"], document["samples_per_prompt"]) == ("p", 4)
        assert document["datasets"][0]["train"] == 2

    def test_an_existing_output_is_kept_unless_forced(self, prepare):
        assert prepare("--output", "p").exit_code == 0
        result = prepare("--output", "p")
        assert result.exit_code == 2
        assert "--force" in result.stderr
        assert prepare("--output", "p", "--force").exit_code == 0

    def test_a_source_that_is_not_there_is_a_usage_error(self, fails):
        error = fails(2, "data", "prepare", "--source", "none.csv", "--output", "p")
        assert error.startswith("none.csv: no such file")


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
        assert "held out for validation" in result.stdout

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
        assert error.startswith(f"{other}: {run} ")
        assert str(collection.file("colors")) in error

    def test_the_run_s_own_file_that_has_changed_is_refused(self, fails, train_lora, dataset):
        file = dataset()
        run = train_lora(file=file).directory
        file.write_text(file.read_text(encoding="utf-8").upper(), encoding="utf-8")
        error = fails(1, "data", "uses", f"{file}:2", "--run", run)
        assert error.startswith(f"{file}")
        assert "changed" in error

    @pytest.mark.parametrize(
        "place, message",
        [
            ("{file}:17", "{file}:17: "),
            ("{file}", "{file}: expected FILE:LINE"),
            ("{file}:0", "{file}:0: expected FILE:LINE"),
            ("none.jsonl:3", "none.jsonl: no such file"),
        ],
    )
    def test_what_is_no_row_is_a_usage_error(self, fails, run, file, place, message):
        error = fails(2, "data", "uses", place.format(file=file), "--run", run)
        assert error.startswith(message.format(file=file))

    def test_a_run_that_is_not_there(self, fails, file):
        error = fails(2, "data", "uses", f"{file}:1", "--run", "none")
        assert error.startswith("none: ")


class TestPosition:
    @pytest.mark.parametrize(
        "place, file, line",
        [
            (r"C:\data\x.jsonl:12", r"C:\data\x.jsonl", 12),
            ("C:/data/x.jsonl:1", "C:/data/x.jsonl", 1),
            ("a:b.jsonl:3", "a:b.jsonl", 3),
        ],
    )
    def test_the_last_colon_is_the_border(self, place, file, line):
        assert parse_position(place) == (Path(file), line)

    @pytest.mark.parametrize("place", [str(PureWindowsPath("C:/x.jsonl")), ":3", "x.jsonl:", "x:²"])
    def test_what_has_no_line_is_refused(self, place):
        with pytest.raises(UsageError, match="FILE:LINE"):
            parse_position(place)
