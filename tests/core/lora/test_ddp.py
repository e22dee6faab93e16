"""Two processes on the CPU, started as a user would; in-process they would rerun the tests."""

import json
import subprocess
import sys

import pytest
import torch

from loragen.core.base_models import load_base
from loragen.core.checkpoints import read_tensors
from loragen.core.lora.train import base_dtype, train
from loragen.core.progress import Silent
from loragen.core.runs import LoraManifest, checkpoint_files, read_manifest

SETTINGS = {"trainer.precision": "64-true", "training.max_steps": 4, "checkpoints.first_step": 3}


@pytest.fixture(scope="module")
def command(tmp_path_factory, base_dir):
    """`command(file, config, *arguments)` runs `loragen lora train` and gives the process."""

    def run(file, config, *arguments):
        settings = ["base_model", "data.max_length", "lora.rank", "lora.alpha"]
        work = tmp_path_factory.mktemp("ddp")
        (work / "c.yaml").write_text(config, encoding="utf-8")
        assert settings
        return work, subprocess.run(
            [sys.executable, "-m", "loragen", "lora", "train", "--config", "c.yaml"]
            + ["--dataset", str(file), "--runs-dir", "runs", *arguments],
            cwd=work,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    return run


@pytest.mark.skipif(sys.platform == "win32", reason="gloo over processes is not tested there")
def test_two_processes_are_one(command, lora_config, dataset):
    from loragen.core.config import dump

    file = dataset([{"prompt": "q" * i, "response": "red cat"[: 1 + i % 7]} for i in range(1, 12)])
    config = lora_config(SETTINGS)
    base = load_base(config.base_model, base_dtype(config))
    alone = train(config, "colors", file, base, Silent())
    work, result = command(
        file, dump(config), "--json", "--set", "trainer.devices=2", "--set", "trainer.strategy=ddp"
    )
    assert result.returncode == 0, result.stderr
    (run,) = (work / "runs").iterdir()
    assert [f.name for f in checkpoint_files(run)] == [
        f.name for f in checkpoint_files(alone.directory)
    ]
    for one, other in zip(checkpoint_files(alone.directory), checkpoint_files(run), strict=True):
        first, second = read_tensors(one), read_tensors(other)
        assert first.keys() == second.keys()
        assert all(torch.dist(first[key], second[key]) < 1e-10 for key in first)
    manifest = read_manifest(run, LoraManifest)
    assert manifest.status == "success"
    assert manifest.final_loss == pytest.approx(alone.manifest.final_loss, abs=1e-10)
    assert (run / "adapter").is_dir()
    assert (run / "final_model").is_dir()
    (document,) = json.loads(result.stdout)  # one answer, not one a process
    assert document["run"].endswith(run.name)
