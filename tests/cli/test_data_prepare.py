import json

import pytest


@pytest.fixture
def prepare(loragen, dataset):
    return lambda *arguments: loragen("data", "prepare", "--source", dataset(), *arguments)


def test_the_originals_spelling(prepare, loragen):
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


def test_json_is_one_document(prepare):
    document = json.loads(prepare("--output", "p", "--json").stdout)
    assert (document["output_dir"], document["samples_per_prompt"]) == ("p", 4)
    assert document["datasets"][0]["train"] == 2


def test_an_existing_output_is_kept_unless_forced(prepare):
    assert prepare("--output", "p").exit_code == 0
    result = prepare("--output", "p")
    assert result.exit_code == 2
    assert "choose another place or add --force" in result.stderr
    assert prepare("--output", "p", "--force").exit_code == 0


def test_a_source_that_is_not_there_is_a_usage_error(fails):
    error = fails(2, "data", "prepare", "--source", "none.csv", "--output", "p")
    assert error == "none.csv: no such file"
