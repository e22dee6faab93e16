"""Two processes on the CPU, started as a user would; in-process they would rerun the tests."""

import shutil
import subprocess
import sys

import pytest
import torch

from loragen.core.config import GenTrainConfig, dump, load
from loragen.core.learning.train import train
from loragen.core.progress import Silent
from loragen.core.run.directory import GENERATOR_FILE, GeneratorManifest, read_manifest
from loragen.core.run.metrics import read_metrics

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
    "decoder": {"name": "mixture", "hidden_dim": 16},
    "training.val_rows": 4,
    "behaviour.max_steps": 3,
    "behaviour.batch_size": 2,
    "behaviour.rows_per_adapter": 3,
    "data.batch_size": 2,
}
SETTINGS = {"both-phases": BOTH_PHASES, "transfer": TRANSFER}


# As a user's script would: Lightning starts it once more for the second device.
SCRIPT = """\
import sys
from loragen.cli.main import app

for name in sys.argv[1:]:
    options = ["trainer.devices=2", "trainer.strategy=ddp", f"experiments_dir=two-{name}"]
    settings = [part for option in options for part in ("--set", option)]
    app(["gen", "train", "--config", f"{name}.yaml", *settings], standalone_mode=False)
"""


def test_two_processes_train_what_one_does(gen_config, collection, tmp_path):
    """For every objective; up to rounding, and written once."""
    sources = []  # four datasets: an adapter may stand beside any rows
    for name, run in collection.runs.items():
        lines = collection.file(name).read_text(encoding="utf-8").splitlines(keepends=True)
        for i in range(2):
            copied = shutil.copytree(run / "adapter", tmp_path / f"{name}-{i}")
            rows = tmp_path / f"{name}-{i}.jsonl"
            rows.write_text("".join(lines[i::2]), encoding="utf-8")
            sources.append({"checkpoints": str(copied), "prompts": str(rows)})
    alone = {}
    for name, settings in SETTINGS.items():
        config = gen_config({**settings, "sources": sources})
        (tmp_path / f"{name}.yaml").write_text(dump(config), encoding="utf-8")
        alone[name] = train(
            load(GenTrainConfig, tmp_path / f"{name}.yaml", environment={}), Silent()
        )
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    result = subprocess.run(
        [sys.executable, "script.py", *SETTINGS],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    made = result.stdout.split()
    for name, path in zip(SETTINGS, made, strict=True):
        (together,) = (tmp_path / f"two-{name}").iterdir()  # made once, not once a process
        assert tmp_path / path == together
        assert_alike(alone[name].directory, together)


def assert_alike(alone, together):
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
