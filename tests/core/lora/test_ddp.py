"""Two processes on the CPU, started as a user would; in-process they would rerun the tests."""

import json
import subprocess
import sys

import pytest
import torch

from loragen.core.base.load import load_training_base
from loragen.core.config import LoraTrainConfig, load
from loragen.core.data.dataset import Dataset
from loragen.core.lora.train import train_adapter
from loragen.core.progress import Silent
from loragen.core.run.checkpoints import load_adapter
from loragen.core.run.directory import LoraManifest, checkpoint_files, read_manifest
from loragen.core.run.metrics import read_metrics

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo is not tested there")

CONFIG = """\
base_model: {base}
data: {{max_length: 64}}
lora: {{rank: 2}}
training: {{batch_size: 4, max_steps: 4, packing: false}}
schedule: {{stage1_steps: 2, learning_rate_stage1: 1.0e-2}}
checkpoints: {{first_step: 3}}
loggers: {{swanlab: {{}}}}
trainer: {{accelerator: cpu, precision: 64-true}}
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory, base_dir):
    """A working directory with `c.yaml` and rows of unequal length in `colors.jsonl`."""
    directory = tmp_path_factory.mktemp("ddp")
    text = CONFIG.format(base=json.dumps(str(base_dir)))
    (directory / "c.yaml").write_text(text, encoding="utf-8")
    rows = [{"prompt": "q" * i, "response": "red cat"[: 1 + i % 7]} for i in range(1, 12)]
    lines = "\n".join(map(json.dumps, rows))
    (directory / "colors.jsonl").write_text(lines, encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def two(work):
    """The finished process of `loragen lora train` on two devices."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "loragen", "lora", "train", "--config", "c.yaml", "--json"),
            *("--dataset", "colors.jsonl", "--runs-dir", "two"),
            *("--set", "trainer.devices=2", "--set", "trainer.strategy=ddp"),
        ],
        cwd=work,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


def test_two_processes_train_what_one_does(work, two):
    assert two.returncode == 0, two.stderr
    (run,) = (work / "two").iterdir()  # made once, not once a process
    settings = [f"runs_dir={work / 'one'}"]
    config = load(LoraTrainConfig, work / "c.yaml", settings, environment={})
    base = load_training_base(config)
    alone = train_adapter(config, Dataset(work / "colors.jsonl", "colors"), base, Silent())
    ours, theirs = checkpoint_files(alone.directory), checkpoint_files(run)
    assert [file.name for file in ours] == [file.name for file in theirs]
    for one, other in zip(ours, theirs, strict=True):
        first, second = load_adapter(one).tensors, load_adapter(other).tensors
        assert first.keys() == second.keys()
        assert all(torch.dist(first[key], second[key]) < 1e-10 for key in first)
    manifest = read_manifest(run, LoraManifest)
    assert manifest.status == "success"
    assert manifest.final_loss == pytest.approx(alone.manifest.final_loss, abs=1e-10)
    assert (run / "adapter").is_dir()


def test_two_processes_log_once(work, two):
    (run,) = (work / "two").iterdir()
    assert [entry["step"] for entry in read_metrics(run / "metrics.jsonl")] == [1, 2, 3, 4]
    run_id = read_manifest(run, LoraManifest).logger_run_ids["swanlab"]
    (directory,) = [path for path in (run / "swanlab_logs").iterdir() if path.is_dir()]
    assert directory.name.endswith(run_id)


def test_two_processes_give_one_answer(two):
    (document,) = json.loads(two.stdout)
    assert document["status"] == "success"


def test_torchrun_trains_several_datasets_and_reports_them_once(work):
    """One process per device from the start; one dataset fails on all of them."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    (work / "bad.jsonl").write_text("{}", encoding="utf-8")
    (work / "cats.jsonl").write_bytes((work / "colors.jsonl").read_bytes())
    result = subprocess.run(
        [
            *(*torchrun, "--nproc-per-node=2", "--no-python"),
            *(sys.executable, "-m", "loragen", "lora", "train", "--config", "c.yaml", "--json"),
            *("--dataset", "colors.jsonl", "--dataset", "bad.jsonl", "--dataset", "cats.jsonl"),
            *("--runs-dir", "outside", "--set", "trainer.devices=2"),
        ],
        cwd=work,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert result.returncode == 1
    documents = json.loads(result.stdout)
    outcomes = [document["outcome"] for document in documents]
    assert outcomes == ["trained", "failed", "trained"], result.stderr
    assert len(list((work / "outside").iterdir())) == 2
    assert result.stderr.count("error: bad: ") == 1
