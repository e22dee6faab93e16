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
    train_multi_task,
    train_oracles,
)
from loragen.core.progress import Silent
from loragen.core.run.directory import LoraManifest, Run
from tests.conftest import ANIMALS, COLORS, rows_of, write_lines


def test_the_multi_task_lora_has_all_rows_and_is_trained_once(setup, base, tmp_path):
    sources = setup().sources
    first = train_multi_task(sources, base, tmp_path, Silent())
    assert first.run.manifest.dataset.rows == 32
    answers = {row.response for row in Dataset(next((tmp_path / "multi-task").iterdir())).rows()}
    assert answers == {*ANIMALS, *COLORS}
    assert first.steps <= 4 * 2 * 8
    again = train_multi_task(sources, base, tmp_path, Silent())
    assert again == first
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_it_is_trained_at_the_highest_rate_until_it_gets_no_better(lora_config):
    config = multi_task_config(lora_config(), most_steps=100)
    assert config.schedule.name == "constant"
    assert config.schedule.options["learning_rate"] == 1e-2
    assert (config.training.max_steps, config.training.patience) == (100, 8)
    assert config.data.val_ratio > 0
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
