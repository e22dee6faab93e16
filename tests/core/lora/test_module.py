"""The checkpoints that there are during a run and after it."""

import signal

import pytest
import torch

from loragen.core.data.dataset import Dataset
from loragen.core.errors import Interrupted
from loragen.core.lora.train import train_adapter
from loragen.core.progress import Silent
from loragen.core.run.directory import (
    LoraManifest,
    checkpoint_files,
    find_checkpoints,
    read_manifest,
)
from loragen.core.run.metrics import read_metrics


class Watching(Silent):
    """What lies in checkpoints/ at the start of each step's end; may send signals at one."""

    def __init__(self, runs, at=0, signals=()):
        self.runs, self.at, self.signals, self.seen = runs, at, signals, {}

    def step(self, step):
        files = (path.name for path in self.runs.glob("*/checkpoints/*"))
        self.seen[step.step] = sorted(short(name) for name in files)
        if step.step == self.at:
            for number in self.signals:
                signal.raise_signal(number)


def short(name):
    return name.removeprefix("checkpoint-step-").removesuffix(".ckpt")


@pytest.fixture
def watch(lora_config, base, dataset, tmp_path):
    def run(settings=None, at=0, signals=()):
        watching = Watching(tmp_path / "runs", at, signals)
        try:
            train_adapter(lora_config(settings), Dataset(dataset(), "colors"), base, watching)
        finally:
            (watching.run,) = (tmp_path / "runs").iterdir()
            names = (path.name for path in (watching.run / "checkpoints").iterdir())
            watching.after = sorted(map(short, names))
        return watching

    run.runs = tmp_path / "runs"
    return run


@pytest.mark.parametrize(
    "keeps, before_8, after",
    [
        ("all", ["005", "006", "007"], ["005", "006", "007", "008"]),
        ("last", ["005", "006", "007", "last"], ["005", "006", "007", "008"]),
        ("none", ["005", "006", "007", "last"], ["005", "006", "007", "008"]),
    ],
)
def test_last_ckpt_exists_only_while_it_is_needed(watch, keeps, before_8, after):
    watching = watch({"checkpoints.optimizer": keeps, "checkpoints.last_every": 2})
    seen = watching.seen
    assert (seen[1], seen[2], seen[3], seen[5]) == ([], [], ["last"], ["last"])
    assert seen[8] == before_8
    assert watching.after == after


def test_last_ckpt_is_not_one_of_the_step_checkpoints(watch):
    with pytest.raises(Interrupted):
        watch({"checkpoints.optimizer": "none"}, at=6, signals=[signal.SIGINT])
    (run,) = watch.runs.iterdir()
    assert (run / "checkpoints" / "last.ckpt").is_file()
    assert [short(f.name) for f in checkpoint_files(run)] == ["005", "006"]
    assert find_checkpoints(run) == checkpoint_files(run)
    assert read_manifest(run, LoraManifest).steps == [5, 6]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step, file", [(3, "last"), (6, "checkpoint-step-006")])
def test_a_signal_ends_the_run_once_its_step_is_saved(watch, number, step, file):
    with pytest.raises(Interrupted, match=f"step {step} of 8"):
        watch({}, at=step, signals=[number])
    (run,) = watch.runs.iterdir()
    saved = torch.load(run / "checkpoints" / f"{file}.ckpt", weights_only=True)
    assert saved["global_step"] == step
    assert saved["optimizer_states"]
    assert read_manifest(run, LoraManifest).status == "interrupted"
    assert [entry["step"] for entry in read_metrics(run / "metrics.jsonl")][-1] == step


def test_a_second_signal_ends_the_run_at_once(watch):
    with pytest.raises(KeyboardInterrupt):
        watch({}, at=6, signals=[signal.SIGINT, signal.SIGINT])
    (run,) = watch.runs.iterdir()
    assert [short(f.name) for f in checkpoint_files(run)] == ["005"]
    assert read_manifest(run, LoraManifest).status == "interrupted"


def test_an_interrupted_run_can_be_traced(watch):
    with pytest.raises(Interrupted):
        watch({"track_batches": True}, at=6, signals=[signal.SIGTERM])
    (run,) = watch.runs.iterdir()
    text = (run / "tracking" / "checkpoint_mapping_colors.json").read_text(encoding="utf-8")
    assert "checkpoint-step-006.ckpt" in text
    assert "checkpoint-step-007.ckpt" not in text


def test_a_step_with_a_validation_is_saved_with_the_state_of_early_stopping(watch):
    settings = {"data.val_ratio": 0.25, "training.val_every": 3, "training.patience": 30}
    watching = watch({**settings, "checkpoints.first_step": 1})
    counts = {}
    for file in checkpoint_files(watching.run):
        saved = torch.load(file, weights_only=True)["callbacks"]
        (state,) = [value for key, value in saved.items() if key.startswith("EarlyStopping")]
        counts[int(short(file.name))] = float(state["best_score"])
    losses = {e["step"]: e["val/loss"] for e in read_metrics(watching.run / "metrics.jsonl")
              if "val/loss" in e}  # fmt: skip
    assert list(losses) == [3, 6]
    assert counts[2] == float("inf")
    assert counts[3] == counts[5] == pytest.approx(losses[3])
    assert counts[6] == pytest.approx(min(losses.values()))


def test_the_last_checkpoint_of_an_early_stop_carries_the_optimizer(watch):
    """`checkpoints.optimizer: last` means the last there is, not the last there might have been."""
    settings = {
        "data.val_ratio": 0.5, "training.max_steps": 40, "training.val_every": 2,
        "training.patience": 4, "schedule.learning_rate_stage1": 3e-2,
        "schedule.stage1_steps": 40, "checkpoints.first_step": 1, "checkpoints.optimizer": "last",
    }  # fmt: skip
    watching = watch(settings)
    *others, last = checkpoint_files(watching.run)
    assert len(others) < 39
    assert torch.load(last, weights_only=True)["optimizer_states"]
    assert not torch.load(others[-1], weights_only=True)["optimizer_states"]


def test_a_signal_after_the_last_step_is_raised_once_the_run_is_finished(watch, monkeypatch):
    """A collection has to stop, though this run is finished."""
    from loragen.core.lora import train as training

    monkeypatch.setattr(training, "write_adapter", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Interrupted, match="is finished"):
        watch()
    (run,) = watch.runs.iterdir()
    assert read_manifest(run, LoraManifest).status == "success"
