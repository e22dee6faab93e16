"""The adapters that are trained for the comparison: their data, their configuration, once."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from loragen.core.config import LoraTrainConfig
from loragen.core.data.dataset import Dataset
from loragen.core.evaluation.targets import find_targets
from loragen.core.evaluation.training import (
    best_checkpoint,
    multi_task_config,
    train_labelled,
    train_multi_task,
    train_oracles,
    validation_losses,
)
from loragen.core.progress import Silent
from loragen.core.run.directory import LoraManifest, Run
from tests.conftest import ANIMALS, COLORS, rows_of, write_lines


def test_the_multi_task_lora_has_all_rows_and_is_the_best_of_several_trained_once(
    setup, base, tmp_path
):
    sources = setup().sources
    first = train_multi_task(sources, base, tmp_path, Silent())
    runs = [first.run, *first.rivals]
    assert all(run.manifest.dataset.rows == 32 for run in runs)
    answers = {row.response for row in Dataset(next((tmp_path / "multi-task").iterdir())).rows()}
    assert answers == {*ANIMALS, *COLORS}
    assert first.steps <= 4 * 2 * 8
    rates = [run.config.schedule.options["learning_rate"] for run in runs]
    assert {round(rate, 6) for rate in rates} == {3e-3, 1e-2, 3e-2}
    lowest = [min(validation_losses(run).values()) for run in runs]
    assert lowest[0] == min(lowest)
    assert first.seconds == sum(run.manifest.seconds for run in runs)
    assert all(run.checkpoints == [best_checkpoint(run)] for run in runs)
    again = train_multi_task(sources, base, tmp_path, Silent())
    assert again.checkpoint == first.checkpoint
    assert len(list((tmp_path / "runs").iterdir())) == 3


def test_its_steps_can_be_limited(setup, base, tmp_path):
    trained = train_multi_task(setup().sources, base, tmp_path, Silent(), most_steps=3)
    assert all(run.manifest.max_steps == 3 for run in (trained.run, *trained.rivals))


def test_it_is_trained_at_the_highest_rate_until_it_gets_no_better(lora_config):
    config = multi_task_config(lora_config(), most_steps=200, rows=400)
    assert config.schedule.name == "constant"
    third = multi_task_config(lora_config(), 200, 400, 0.3).schedule.options["learning_rate"]
    assert third == pytest.approx(3e-3)
    assert config.schedule.options["learning_rate"] == 1e-2
    assert (config.training.max_steps, config.training.patience) == (200, 20)
    assert multi_task_config(lora_config(), most_steps=50, rows=400).training.patience == 8
    assert config.data.val_ratio == 0.05
    many = multi_task_config(lora_config(), most_steps=200, rows=12800)
    assert many.data.val_ratio == pytest.approx(0.01)
    LoraTrainConfig.model_validate(config.model_dump())


def test_the_best_checkpoint_has_the_lowest_validation_loss(tmp_path):
    entries = [{"step": 1, "train/loss": 0.1}]
    entries += [{"step": step, "val/loss": loss} for step, loss in ((2, 0.5), (4, 0.3), (6, 0.4))]
    text = "".join(json.dumps(entry) + "\n" for entry in entries)
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    run = Run(tmp_path, None)
    assert best_checkpoint(run) == tmp_path / "checkpoints" / "checkpoint-step-004.ckpt"


@pytest.mark.parametrize("changed", [False, True])
def test_an_oracle_learns_the_train_split_and_other_data_train_another(
    setup, base, tmp_path, changed
):
    root, cache = tmp_path / "data", tmp_path / "cache"
    for split in ("train", "test"):
        write_lines(root / "colors" / f"{split}.jsonl", rows_of(COLORS, 12))
    found = find_targets(["colors"], root)
    first = train_oracles(found, setup().sources, base, cache, Silent())
    manifest = first["all", "colors"].run.manifest
    assert manifest.dataset.path == str(root / "colors" / "train.jsonl")
    assert manifest.steps == [8]
    if changed:
        write_lines(root / "colors" / "train.jsonl", rows_of(COLORS, 9))
        found = find_targets(["colors"], root)
    again = train_oracles(found, setup().sources, base, cache, Silent())
    assert (again == first) is not changed


def test_a_collected_run_of_the_same_training_is_the_oracle(setup, base, collection, tmp_path):
    """As in a k-fold experiment, where the adapter of a held-out dataset is collected already."""
    for split in ("train", "test"):
        file = tmp_path / "data" / "colors" / f"{split}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(collection.file("colors"), file)
    found = find_targets(["colors"], tmp_path / "data")
    own = [source for source in setup().sources if source.name == "animals"]
    beside = train_oracles(found, own, base, tmp_path / "cache", Silent())["all", "colors"]
    assert beside.run.directory.name == collection.runs["colors"].name
    assert beside.checkpoint.stem == "checkpoint-step-008"
    shutil.copytree(beside.run.directory, tmp_path / "named" / beside.run.directory.name)
    named = [tmp_path / "named"]
    oracles = train_oracles(found, own, base, tmp_path / "cache", Silent(), named)
    assert oracles["all", "colors"].run.directory.parent == tmp_path / "named"
    assert not (tmp_path / "cache").exists()


def test_the_label_curve_trains_on_nested_samples_and_ends_at_the_oracle(setup, base, tmp_path):
    root, cache = tmp_path / "data", tmp_path / "cache"
    for split in ("train", "test"):
        write_lines(root / "colors" / f"{split}.jsonl", rows_of(COLORS, 12))
    found = find_targets(["colors"], root)
    sources = setup().sources
    curve = train_labelled(found, [2, 5, 300], sources, base, cache, Silent())
    rows = {size: one.run.manifest.dataset.rows for (*_, size), one in curve.items()}
    assert rows == {2: 2, 5: 5, 300: 12}
    files = {size: one.run.manifest.dataset.path for (*_, size), one in curve.items()}
    few, more = ({row.prompt for row in Dataset.at(files[size]).rows()} for size in (2, 5))
    assert few < more
    oracle = train_oracles(found, sources, base, cache, Silent())["all", "colors"]
    assert curve["all", "colors", 300] == oracle
    assert (
        train_labelled(found, [2], sources, base, cache, Silent())["all", "colors", 2]
        == (curve["all", "colors", 2])
    )


def test_an_oracle_is_trained_on_the_base_in_the_dtype_of_lora_train_and_found_again(
    setup, base, collection, tmp_path
):
    run = shutil.copytree(collection.runs["colors"], tmp_path / "run")
    text = (run / "config.yaml").read_text("utf-8")
    assert "base_dtype: auto" in text
    half = text.replace("base_dtype: auto", "base_dtype: bfloat16")
    (run / "config.yaml").write_text(half, encoding="utf-8")
    sources = [replace(setup().sources[1], run=Run.open(run, LoraManifest))]
    for split in ("train", "test"):
        file = write_lines(tmp_path / "data" / "colors" / f"{split}.jsonl", rows_of(COLORS, 12))
        file.write_text(file.read_text("utf-8") + "no row\n", encoding="utf-8")
    found = find_targets(["colors"], tmp_path / "data", skip_bad_rows=True)
    first = train_oracles(found, sources, base, tmp_path / "cache", Silent())
    manifest = first["all", "colors"].run.manifest
    assert (manifest.base_dtype, manifest.dataset.rows) == ("bfloat16", 12)
    assert base.model.dtype == torch.float32
    assert train_oracles(found, sources, base, tmp_path / "cache", Silent()) == first
