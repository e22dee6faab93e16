import json

import pytest
import yaml

from loragen.core.config import GenTrainConfig, LoraTrainConfig, load
from tests.processes import run_in_turn

OLD = "training:\n  per_device_train_batch_size: 8\n  stage1: {steps: 75}\n"


@pytest.fixture
def write(loragen):
    """`write(text)`: `c.yaml` in the working directory."""

    def put(text, name="c.yaml"):
        (loragen.work / name).write_text(text, encoding="utf-8")
        return name

    return put


class TestInit:
    @pytest.mark.parametrize("command, model", [("lora", LoraTrainConfig), ("gen", GenTrainConfig)])
    def test_it_writes_the_defaults_as_a_file_that_loads(self, loragen, write, command, model):
        result = loragen("config", "init", command)
        assert result.exit_code == 0, result.output
        assert result.stderr == ""
        assert yaml.safe_load(result.stdout)["seed"] == 42
        write(result.stdout)
        written = load(model, loragen.work / "c.yaml", environment={})
        assert written == load(model, environment={})

    @pytest.mark.parametrize("command", ["lora", "gen"])
    def test_every_line_is_explained_or_heads_a_section(self, loragen, command):
        for line in loragen("config", "init", command).stdout.splitlines():
            head = line.rstrip().endswith(":")
            assert head or len(line.partition("# ")[2]) > 10, line

    def test_the_options_of_a_plugin_are_explained(self, loragen):
        lines = [line.strip() for line in loragen("config", "init", "gen").stdout.splitlines()]
        assert "positions: sentence  # " in "\n".join(lines)
        assert any(
            line.startswith("name: auto  # mixture: an affine combination") for line in lines
        )
        (swanlab,) = [line for line in lines if line.startswith("workspace:")]
        assert swanlab.startswith("workspace: null  # Team or user")
        assert "tensorboard:" in lines

    def test_an_unknown_command_is_a_usage_error(self, loragen):
        result = loragen("config", "init", "loar")
        assert result.exit_code == 2
        assert result.stdout == ""
        assert "loar" in result.stderr


class TestShow:
    def test_each_value_with_its_origin(self, loragen, write, monkeypatch):
        monkeypatch.setenv("LORAGEN_RUNS_DIR", "there")
        file = write("training:\n  batch_size: 8\n")
        result = loragen("config", "show", "lora", "--config", file, "--set", "seed=3")
        assert result.exit_code == 0, result.output
        lines = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines()}
        assert lines["setting"] == ["value", "from"]
        assert lines["training.batch_size"] == ["8", "c.yaml:2:3"]
        assert lines["seed"] == ["3", "--set"]
        assert lines["runs_dir"] == ["there", "LORAGEN_RUNS_DIR"]
        assert lines["training.max_steps"] == ["125", "default"]

    def test_a_value_of_an_old_file_keeps_its_position(self, loragen, write):
        file = write("training:\n  stage1: {steps: 75}\n")
        document = json.loads(loragen("config", "show", "lora", "--config", file, "--json").stdout)
        found = document["schedule.stage1_steps"]
        assert (found["value"], found["origin"]) == (75, f"{file}:2:12 (training.stage1.steps)")

    def test_one_json_document(self, loragen):
        result = loragen("config", "show", "gen", "--set", "layout.token_dim=8", "--json")
        document = json.loads(result.stdout)
        assert document["layout.token_dim"] == {"value": 8, "origin": "--set"}
        assert document["decoder.name"] == {"value": "auto", "origin": "default"}


class TestValidate:
    @pytest.mark.parametrize(
        "text, command",
        [
            ("training: {patience: 3}\ndata: {val_ratio: 0.1}", "lora"),
            ("training: {mse_weight: 2}", "gen"),
            ("", "lora"),
        ],
    )
    def test_a_valid_file(self, loragen, write, text, command):
        result = loragen("config", "validate", write(text))
        assert (result.exit_code, result.stderr) == (0, "")
        assert result.stdout == f"c.yaml: valid ({command} train)\n"

    def test_every_error_at_once(self, fails, write):
        write("training:\n  batch_size: x\n  max_stps: 3\nschedule: {stage1_steps: -1}\n")
        before, found, after = fails(2, "config", "validate", "c.yaml", lines=3)
        assert before.startswith("c.yaml:2:3: training.batch_size: ")
        assert found.startswith("c.yaml:3:3: training.max_stps: unknown key")
        assert "'max_steps'" in found
        assert after.startswith("c.yaml:4:12: schedule.stage1_steps: ")

    def test_the_command_may_be_given(self, fails, loragen, write):
        write("training: {max_steps: 3}")
        result = loragen("config", "validate", "c.yaml", "--command", "gen")
        assert result.stdout == "c.yaml: valid (gen train)\n"
        write("decoder: {blocks: 3}")
        assert "decoder: unknown key" in fails(
            2, "config", "validate", "c.yaml", "--command", "lora"
        )

    def test_environment_variables_are_not_read(self, loragen, write, monkeypatch):
        monkeypatch.setenv("LORAGEN_SEED", "x")
        assert loragen("config", "validate", write("seed: 1")).exit_code == 0

    def test_an_old_file_is_valid_with_a_notice(self, loragen, write):
        result = loragen("config", "validate", write(OLD))
        assert result.stdout == "c.yaml: valid (lora train)\n"
        (notice,) = result.stderr.splitlines()
        assert notice.startswith("warning: c.yaml ")
        assert "`loragen config migrate c.yaml`" in notice

    def test_what_a_file_names_for_gen_has_to_be_there(self, fails, loragen, write):
        (loragen.work / "there").mkdir()
        write(
            "sources:\n"
            "- {run: runs/a}\n"
            "- {checkpoints: there, prompts: none.txt}\n"
            "val_sources: [{checkpoints: no/where}]\n"
            "data: {checkpoint_dir: [there, runs/b], prompts: p}\n"
            "encoder: {model: ./bert}\n"
            "behaviour: {base_model: /no/base}\n"
        )
        problems = fails(2, "config", "validate", "c.yaml", lines=7)
        assert [problem.partition(": no such ")[0] for problem in problems] == [
            "c.yaml:2:4: sources.0.run: runs/a",
            "c.yaml:3:24: sources.1.prompts: none.txt",
            "c.yaml:4:16: val_sources.0.checkpoints: no/where",
            "c.yaml:5:32: data.checkpoint_dir.1: runs/b",
            "c.yaml:5:41: data.prompts: p",
            "c.yaml:7:13: behaviour.base_model: base model /no/base",
            "c.yaml:6:11: encoder.model: ./bert",
        ]

    def test_what_a_file_names_for_lora_has_to_be_there(self, fails, loragen, write):
        (loragen.work / "mine.jsonl").touch()
        write("base_model: ./base\ncollection: [mine.jsonl, no.jsonl]\ndata: {validation: v.csv}\n")
        problems = fails(2, "config", "validate", "c.yaml", lines=3)
        assert [problem.partition(": no such ")[0] for problem in problems] == [
            "c.yaml:1:1: base_model: base model ./base",
            "c.yaml:2:26: collection.1: no.jsonl",
            "c.yaml:3:8: data.validation: v.csv",
        ]
        write("data: {root: nowhere}")
        error = fails(2, "config", "validate", "c.yaml")
        assert error.startswith("c.yaml:1:8: data.root: nowhere: ")

    @pytest.mark.parametrize("command", ["lora", "gen"])
    def test_the_defaults_are_valid(self, loragen, write, command):
        write(loragen("config", "init", command).stdout)
        assert "valid" in loragen("config", "validate", "c.yaml").stdout

    def test_the_hub_is_not_asked(self, loragen, write):
        text = (
            "base_model: owner/base\ndata: {dataset: 'hub:owner/rows', validation: 'hub:owner/v'}"
        )
        assert loragen("config", "validate", write(text)).exit_code == 0

    def test_a_name_in_place_of_a_source(self, fails, write):
        write("val_sources: [colors]")
        error = fails(2, "config", "validate", "c.yaml", "--command", "gen")
        assert error.startswith("c.yaml:1:15: val_sources.0: ")
        assert "run, checkpoints, prompts" in error

    def test_a_missing_file(self, fails):
        assert fails(2, "config", "validate", "no").startswith("no: no such")


class TestMigrate:
    def test_it_prints_todays(self, loragen, write):
        result = loragen("config", "migrate", write(OLD))
        assert (result.exit_code, result.stderr) == (0, "")
        assert result.stdout == (
            "# `loragen lora train`, migrated from the traditional format (c.yaml).\n"
            "training:\n"
            "  batch_size: 8  # was training.per_device_train_batch_size\n"
            "schedule:\n"
            "  stage1_steps: 75  # was training.stage1.steps\n"
        )

    def test_it_writes_a_file_and_nothing_over_another(self, loragen, fails, write):
        arguments = ("config", "migrate", write(OLD), "--output", "new.yaml")
        result = loragen(*arguments)
        assert result.stdout == "new.yaml\n"
        new = loragen.work / "new.yaml"
        assert load(LoraTrainConfig, new, environment={}).training.batch_size == 8
        assert fails(2, *arguments).startswith("new.yaml exists")
        assert loragen(*arguments, "--force").exit_code == 0
        new.write_text("mine", encoding="utf-8")
        assert "does not replace it" in fails(2, *arguments, "--force")

    def test_a_directory_is_never_replaced(self, loragen, fails, write):
        (loragen.work / "there").mkdir()
        error = fails(2, "config", "migrate", write(OLD), "--output", "there", "--force")
        assert "directory" in error

    def test_a_file_of_today_stays_as_it_is(self, loragen, write):
        result = loragen("config", "migrate", write("seed: 3  # mine\n"))
        assert result.stdout == "seed: 3  # mine\n"
        assert "nothing to migrate" in result.stderr

    def test_what_cannot_be_translated_is_an_error(self, fails, write):
        write(OLD + "  optimizer: sgd\n")
        error = fails(2, "config", "migrate", "c.yaml", "--output", "new.yaml")
        assert error.startswith("c.yaml:4:3: training.optimizer: ")


@pytest.mark.parametrize("command", ["lora", "gen"])
def test_the_schema_is_one_json_document(loragen, command):
    document = json.loads(loragen("config", "schema", command).stdout)
    assert {"seed", "training", "loggers"} <= set(document["properties"])


def test_a_training_reads_an_old_file(loragen, write, dataset, base_dir):
    rows = dataset()
    result = loragen(
        "lora", "train", "--config", write(OLD), "--dataset", rows, "--base-model", base_dir,
        "--dry-run",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert yaml.safe_load(result.stdout)["training"]["batch_size"] == 8
    assert result.stderr.count("loragen config migrate") == 1


def test_an_unknown_variable_is_warned_of_once(loragen, monkeypatch):
    monkeypatch.setenv("LORAGEN_TRAINNG__MAX_STEPS", "3")
    monkeypatch.setenv("LORAGEN_ENCODER__BATCH_SIZE", "3")  # of the other command
    (warning,) = loragen("config", "show", "lora").stderr.splitlines()
    assert warning.startswith("warning: LORAGEN_TRAINNG__MAX_STEPS ")
    assert warning.endswith("Did you mean LORAGEN_TRAINING__MAX_STEPS?")
    assert loragen("config", "show", "lora").stderr == ""  # it is one process


USAGE_ERRORS = [
    ("gen", "train", "--config", "none.yaml"),
    ("gen", "train", "--checkpoint-dir", "none"),
    ("gen", "infer", "--model", "none", "--prompt", "x", "--output", "a"),
    ("gen", "infer", "--model", "c.yaml", "--prompt-file", "none", "--output", "a"),
    ("ckpt", "analyze", "none"),
    ("ckpt", "convert", "none"),
    ("lora", "export", "none", "--output", "a"),
    ("gen", "train", "--config", "c.yaml"),
    ("gen", "train", "--config", "c.yaml", "--set", "bogus=1"),
]


def test_a_usage_error_needs_no_torch(tmp_path):
    """It is there at once; torch and what stands on it take seconds."""
    (tmp_path / "c.yaml").write_text("data: {checkpoint_dir: none}", encoding="utf-8")
    for command, (code, out, err, heavy) in run_in_turn(USAGE_ERRORS, cwd=tmp_path):
        assert (code, out, err.count("error: ")) == (2, "", 1), (command, err)
        assert "torch" not in heavy, command
