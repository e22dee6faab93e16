"""Two processes on the CPU, started as a user would; in-process they would rerun the tests."""

import shutil
import subprocess
import sys

import pytest
import torch

from loragen.core.config import GenTrainConfig, dump, load
from loragen.core.generator.training.train import train
from loragen.core.metrics_log import read_metrics
from loragen.core.progress import Silent
from loragen.core.runs import GENERATOR_FILE, GeneratorManifest, read_manifest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo is not tested there")

BOTH_PHASES = {
    "training.objective": "reconstruction-then-behaviour",
    "training.max_epochs": 2,  # 4 steps
    "training.val_rows": 4,
    "behaviour.max_steps": 3,
    "behaviour.batch_size": 4,
    "behaviour.rows_per_adapter": 3,
    "trainer.accumulate_grad_batches": 2,
    "data.batch_size": 2,
}

TRANSFER = {
    "training.objective": "transfer",
    "training.val_rows": 4,
    "behaviour.max_steps": 3,
    "behaviour.batch_size": 2,
    "behaviour.rows_per_adapter": 3,
    "data.batch_size": 2,
}


@pytest.mark.parametrize("settings", [BOTH_PHASES, TRANSFER], ids=["both phases", "transfer"])
def test_two_processes_train_what_one_does(gen_config, collection, tmp_path, settings):
    """Up to rounding, and written once."""
    sources = [
        {"checkpoints": str(copied), "prompts": str(collection.file(name))}
        for name, run in collection.runs.items()
        for i in range(2)
        for copied in [shutil.copytree(run / "adapter", tmp_path / f"{name}-{i}")]
    ]
    one = gen_config({**settings, "sources": sources, "experiments_dir": str(tmp_path / "one")})
    (tmp_path / "c.yaml").write_text(dump(one), encoding="utf-8")
    alone = train(load(GenTrainConfig, tmp_path / "c.yaml", environment={}), Silent()).directory
    result = subprocess.run(
        [
            *(sys.executable, "-m", "loragen", "gen", "train", "--config", "c.yaml"),
            *("--set", "trainer.devices=2", "--set", "trainer.strategy=ddp"),
            *("--set", f"experiments_dir={tmp_path / 'two'}"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    (together,) = (tmp_path / "two").iterdir()  # made once, not once a process
    assert result.stdout.split() == [str(together)]
    first, second = (
        torch.load(run / GENERATOR_FILE, weights_only=True) for run in (alone, together)
    )
    for key, value in first["state_dict"].items():
        assert torch.allclose(value, second["state_dict"][key], atol=1e-5), key
    assert first["provenance"]["trained_for"] == second["provenance"]["trained_for"]
    logged = [read_metrics(run / "metrics.jsonl") for run in (alone, together)]
    for ours, theirs in zip(*logged, strict=True):
        assert ours["step"] == theirs["step"]
        for name in ours.keys() & {"train/loss", "train/behaviour", "val/loss", "val/behaviour"}:
            assert theirs[name] == pytest.approx(ours[name], rel=1e-3), name
    assert read_manifest(together, GeneratorManifest).status == "success"
