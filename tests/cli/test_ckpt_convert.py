import json
import shutil

import pytest


def test_the_converted_run_trains_a_generator(
    loragen, legacy_run, collection, gen_config, tmp_path
):
    source = legacy_run("full")
    result = loragen("ckpt", "convert", source, "--data-root", collection.data)
    assert result.exit_code == 0, result.output
    assert result.stdout == "runs/colors_lora_20250720_143052\n"
    assert "[1/1] " in result.stderr
    assert "4 checkpoints, steps 5 to 8\n  rank 2, alpha 4, base " in result.stderr
    assert "0 of 4 have an optimizer state that fits" in result.stderr
    analysis = json.loads(loragen("ckpt", "analyze", result.stdout.strip(), "--json").stdout)
    (report,) = analysis["collections"]
    assert (report["checkpoints"], report["values"], report["scaling"]) == (4, 1856, 2.0)

    from loragen.core.learning.train import train
    from loragen.core.progress import Silent

    run = {"run": str(loragen.work / result.stdout.strip())}
    other = {"run": str(collection.runs["animals"])}
    trained = train(gen_config({"sources": [run, other], "training.max_epochs": 1}), Silent())
    assert trained.manifest.status == "success"


def test_the_converted_run_can_be_evaluated(loragen, legacy_run, collection):
    run = loragen("ckpt", "convert", legacy_run()).stdout.strip()
    result = loragen("lora", "eval", "--adapter", run, "--dataset", collection.file("colors"))
    assert result.exit_code == 0, result.output


def test_without_its_dataset_gen_train_asks_for_prompts(loragen, legacy_run):
    result = loragen("ckpt", "convert", legacy_run(), "--output", "runs")
    assert result.exit_code == 0, result.output
    assert "dataset colors: no file found (--dataset FILE, --data-root)" in result.stderr
    result = loragen("gen", "train", "--checkpoint-dir", "runs", "--dry-run")
    assert result.exit_code == 2
    assert "converted without its dataset's file; give the prompts" in result.stderr


def test_one_run_that_fails_stops_no_other(loragen, legacy_run, tmp_path):
    legacy_run(dataset="animals")
    bad = legacy_run(dataset="colors")
    (bad / "checkpoints" / "step_006.pt").write_bytes(b"broken")
    result = loragen("ckpt", "convert", tmp_path / "experiments", "--json")
    assert result.exit_code == 1
    good, failed = json.loads(result.stdout)
    assert good["steps"] == [5, 6, 7, 8]
    assert good["error"] is None
    assert (failed["source"], failed["run"]) == (str(bad), None)
    assert "step_006.pt: not a checkpoint" in failed["error"][0]
    assert f"1 of 2 runs were not converted:\n  {bad}\n" in result.stderr
    assert [run.name for run in (loragen.work / "runs").iterdir()] == [
        "animals_lora_20250720_143052"
    ]
    result = loragen("ckpt", "convert", tmp_path / "experiments", "--skip-bad")
    assert result.exit_code == 0, result.output
    assert "was converted before, to runs/animals_lora_20250720_143052" in result.stderr
    assert "left out: " in result.stderr
    assert len(result.stdout.splitlines()) == 2


def test_what_is_not_recorded_is_a_usage_error(fails, legacy_run, tmp_path):
    source = legacy_run(yaml=False)
    alpha, base = fails(2, "ckpt", "convert", source, "--json", lines=2)
    assert "--alpha" in alpha
    assert "--base-model" in base
    config = tmp_path / "given.yaml"
    config.write_text("base_model: somewhere/else\nlora_alpha: 4\n", encoding="utf-8")
    result = fails.loragen("ckpt", "convert", source, "--config", config, "--json")
    (document,) = json.loads(result.stdout)
    assert (document["base_model"], document["optimizer_states"]) == ("somewhere/else", 4)
    unknown = {"name": "colors", "path": "", "sha256": "", "rows": 0}
    assert document["dataset"].items() >= unknown.items()


def test_a_bare_folder_needs_its_dataset(fails, legacy_run, dataset, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(legacy_run("safetensors") / "checkpoints", bare)
    given = ("--alpha", 4, "--base-model", "somewhere/else")
    assert "--dataset" in fails(2, "ckpt", "convert", bare, *given)
    file = dataset(name="mine.jsonl")
    result = fails.loragen("ckpt", "convert", bare, *given, "--dataset", file, "--json")
    (document,) = json.loads(result.stdout)
    assert document["dataset"]["name"] == "mine"
    assert document["dataset"]["rows"] == 12


def test_the_output_is_a_directory(fails, legacy_run):
    source = legacy_run()
    (fails.loragen.work / "taken").touch()
    error = fails(2, "ckpt", "convert", source, "--output", "taken/runs")
    assert error == "taken is a file; --output is a directory"


@pytest.mark.parametrize("alpha", ["0", "-1", "nan", "inf"])
def test_alpha_is_above_zero(fails, legacy_run, alpha):
    error = fails(2, "ckpt", "convert", legacy_run(), "--alpha", alpha)
    assert error == f"--alpha: has to be a number above 0 (got {alpha})"


def test_nothing_there(fails):
    assert fails(2, "ckpt", "convert", "none") == "none: no such file or directory"
    assert fails(2, "ckpt", "convert", ".").startswith(".: no checkpoints")
