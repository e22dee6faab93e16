"""`lora train --resume`, as a user types it."""

import json
import shutil

import pytest

from loragen.core.base.load import load_training_base
from loragen.core.config import LoraTrainConfig, load
from loragen.core.lora.train import train
from loragen.core.progress import Silent
from loragen.core.run.directory import LoraManifest, read_manifest, write_manifest


def snapshot(directory):
    return {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture
def half(lora_config, dataset):
    """`half({...})`: a run of which only the first checkpoint is left."""

    def run(settings=None):
        config = lora_config(settings)
        base = load_training_base(config)
        directory = train(config, "colors", dataset(), base, Silent()).directory
        for step in (6, 7, 8):
            (directory / "checkpoints" / f"checkpoint-step-00{step}.ckpt").unlink()
        shutil.rmtree(directory / "adapter")
        return directory

    return run


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"base_dtype": "bfloat16"},
        {"trainer.precision": "bf16-true"},
        {"trainer.precision": "64-true"},
        {"trainer.precision": "bf16-mixed"},
    ],
    ids=str,
)
def test_a_run_goes_on_with_nothing_but_its_name(loragen, half, settings):
    run = half(settings)
    result = loragen("lora", "train", "--resume", run)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{run}\n"
    assert f"{run}: found checkpoint-step-005.ckpt; the next step is 6" in result.stderr
    manifest = read_manifest(run, LoraManifest)
    assert (manifest.status, manifest.resumed_from) == ("success", [5])
    assert manifest.steps == [5, 6, 7, 8]
    assert (run / "adapter").is_dir()
    config = load(LoraTrainConfig, run / "config.yaml", environment={})
    assert config.trainer.precision == settings.get("trainer.precision", "32-true")


def test_a_checkpoint_names_its_run(loragen, half):
    run = half()
    path = run / "checkpoints" / "checkpoint-step-005.ckpt"
    result = loragen("lora", "train", "--resume-from-checkpoint", path, "--json")
    (document,) = json.loads(result.stdout)
    assert (document["run"], document["resumed_from"]) == (str(run), [5])


def test_every_difference_is_an_error_and_nothing_is_touched(fails, half, dataset):
    run = half()
    before = snapshot(run)
    other = dataset([{"prompt": "q", "response": "red"}], "other.jsonl")
    errors = fails(
        2, "lora", "train", "--resume", run, "--dataset", other, "--batch-size", 2,
        "--set", "seed=1", lines=3,
    )  # fmt: skip
    assert all(error.startswith(f"{run} cannot go on: ") for error in errors)
    assert [error.split(": ", 1)[1].split(" is ")[0] for error in errors] == [
        "seed", "training.batch_size", f"the data are other data: {other}",
    ]  # fmt: skip
    assert snapshot(run) == before


def test_data_that_are_gone_are_one_line(fails, half, tmp_path):
    run = half()
    (tmp_path / "colors.jsonl").unlink()
    assert fails(2, "lora", "train", "--resume", run) == (
        f"{tmp_path / 'colors.jsonl'}: no such file"
    )


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_a_run_that_was_converted_without_its_dataset_asks_for_it(fails, half, dry):
    run = half()
    manifest = read_manifest(run, LoraManifest)
    manifest.dataset.path = ""
    write_manifest(run, manifest)
    assert fails(2, "lora", "train", "--resume", run, *dry) == (
        f"{run}: its dataset is not recorded; give --dataset FILE"
    )


@pytest.mark.parametrize("path", ["none", "."])
def test_what_is_no_run_is_a_usage_error(fails, path):
    error = fails(2, "lora", "train", "--resume", path)
    assert error.startswith(f"{path}: neither a run directory nor inside one")


def test_one_run_has_one_dataset(fails, half, dataset):
    file = dataset(name="other.jsonl")
    error = fails(2, "lora", "train", "--resume", half(), "--dataset", file, "--dataset", dataset())
    assert error == "--resume goes on with one run, and so with one dataset, here"


def test_a_run_of_test_mode_goes_on(loragen, dataset, base_dir):
    quick = ("--set", "loggers={}", "--set", "trainer.accelerator=cpu", "--test-mode")
    result = loragen("lora", "train", "--dataset", dataset(), "--base-model", base_dir, *quick)
    run = loragen.work / result.stdout.strip()
    (run / "checkpoints" / "checkpoint-step-006.ckpt").unlink()
    result = loragen("lora", "train", "--resume", run)
    assert result.exit_code == 0, result.output
    assert read_manifest(run, LoraManifest).steps == [4, 5, 6]
