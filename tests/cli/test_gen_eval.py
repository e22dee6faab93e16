import json
import shutil

import pytest

from loragen.core.run.directory import GENERATOR_FILE


@pytest.fixture
def arguments(experiment, collection):
    """On both training datasets; a name below a root is tested on its test split."""
    files = [part for name in collection.names for part in ("--dataset", collection.file(name))]
    return ("gen", "eval", "--model", experiment, *files, "--draws", 2, "--limit", 4)


def test_the_tables_and_the_remarks(loragen, arguments):
    result = loragen(*arguments, "--output", "out")
    assert result.exit_code == 0, result.output
    header, *rows = result.stdout.split("\n\n")[0].splitlines()
    assert header.split("  ")[0] == "exact match"
    assert "4-shot  random prompts  generated" in header
    assert [row.split()[0] for row in rows] == ["animals", "colors", "mean"]
    assert (
        "generated: the mean of 2 adapters per dataset, each from 6 unlabelled prompts"
        in result.stdout
    )
    assert {file.name for file in (loragen.work / "out").iterdir()} == {
        "results.json", "results.md", "results.png",
    }  # fmt: skip
    again = loragen(*arguments, "--output", "out")
    assert again.exit_code == 2
    assert "out exists already" in again.stderr


def test_json_is_one_document_with_the_columns_asked_for(loragen, arguments):
    result = loragen(*arguments, "--columns", "base,generated", "--json")
    document = json.loads(result.stdout)
    assert document["columns"] == ["base", "generated"]
    assert document["options"]["draws"] == 2
    assert [one["rows"] for one in document["datasets"]] == [4, 4]
    assert document["novelty"]["within_a_dataset"] > 0


def test_without_the_training_runs_what_needs_them_is_left_out(
    loragen, arguments, experiment, tmp_path, monkeypatch
):
    import torch

    document = torch.load(experiment / GENERATOR_FILE, weights_only=True)
    for record in document["provenance"]["source_records"]:
        record["place"] = str(tmp_path / "elsewhere")
    torch.save(document, loragen.work / "moved.pt")
    moved = ("gen", "eval", "--model", "moved.pt", *arguments[4:])
    result = loragen(*moved, "--json")
    assert result.exit_code == 0, result.output
    assert "warning: the training runs cannot be read" in result.stderr
    results = json.loads(result.stdout)
    assert results["columns"] == [
        "base", "mean_adapter", "few_shot", "random_prompts", "generated",
    ]  # fmt: skip
    assert results["novelty"] is None
    first = ("gen", "eval", "--model", "moved.pt", *arguments[4:6], "--limit", 4, "--json")
    alone = json.loads(loragen(*first).stdout)
    assert alone["columns"] == ["base", "mean_adapter", "few_shot", "generated"]
    asked = loragen(*moved, "--columns", "nearest_adapter")
    assert asked.exit_code == 2
    assert "elsewhere" in asked.stderr


def test_a_generator_of_peft_adapters_finds_their_prompts_again(
    loragen, gen_config, collection, tmp_path, monkeypatch
):
    from loragen.core.adapter.files import read_adapter, write_adapter
    from loragen.core.learning.train import train
    from loragen.core.progress import Silent

    adapter = read_adapter(collection.runs["colors"] / "adapter")
    for step in (1, 2, 3):
        write_adapter(tmp_path / "theirs" / f"step-{step}", adapter, "")
    prompts = shutil.copy(collection.file("colors"), tmp_path / "prompts.jsonl")
    monkeypatch.chdir(tmp_path)
    source = {"checkpoints": "theirs", "prompts": prompts.name}
    run = train(gen_config({"sources": [source], "data.max_checkpoints": 2}), Silent())
    (record,) = run.manifest.source_records
    assert (record.place, record.prompts_from) == (str(tmp_path / "theirs"), str(prompts))
    assert record.count == 2
    monkeypatch.chdir(loragen.work)
    wanted = ("--dataset", collection.file("colors"), "--limit", 4, "--draws", 2)
    result = loragen("gen", "eval", "--model", run.directory, *wanted, "--json")
    assert result.exit_code == 0, result.output
    results = json.loads(result.stdout)
    assert "nearest_adapter" in results["columns"]
    assert results["datasets"][0]["novelty"]["nearest"] in ("theirs/step-2", "theirs/step-3")


def test_a_folder_of_two_splits_can_have_an_oracle(loragen, experiment, collection):
    for split in ("train", "test"):
        place = loragen.work / "data" / "colors" / f"{split}.jsonl"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(collection.file("colors"), place)
    wanted = ("--dataset", "colors", "--data-root", "data", "--columns", "base", "--oracle")
    result = loragen("gen", "eval", "--model", experiment, *wanted, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["columns"] == ["base", "oracle"]
    assert document["datasets"][0]["prompts_from"] == "train split"
    again = loragen("gen", "eval", "--model", experiment, *wanted)
    assert "colors: already trained, " in again.stderr


@pytest.mark.parametrize(
    "more, message",
    [
        (("--columns", "bse"), "Did you mean 'base'?"),
        (("--dataset", "nothing.jsonl"), "nothing.jsonl: no such file"),
        (("--model", "nowhere"), "nowhere: no generator there"),
    ],
)
def test_wrong_arguments_are_a_usage_error(fails, arguments, more, message):
    assert message in fails(2, *arguments, *more)


def test_too_few_prompts_are_an_error_before_anything_is_trained(loragen, fails, experiment):
    line = json.dumps({"prompt": "One?", "response": "one"}) + "\n"
    for split in ("train", "test"):
        place = loragen.work / "data" / "single" / f"{split}.jsonl"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(line, encoding="utf-8")
    wanted = ("--dataset", "single", "--data-root", "data", "--oracle", "--multi-task")
    problem = fails(2, "gen", "eval", "--model", experiment, *wanted)
    assert "need more than 1 prompts" in problem
    assert not (loragen.work / ".loragen-cache").exists()


def test_an_oracle_needs_a_train_split(fails, arguments):
    problems = fails(2, *arguments, "--oracle", lines=2)
    assert "animals: no train split" in problems[0]
