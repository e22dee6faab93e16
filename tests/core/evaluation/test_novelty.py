import pytest
import torch

from loragen.core.adapter.files import Adapter
from loragen.core.analysis.checkpoints import read_checkpoint
from loragen.core.evaluation.statistics import Gallery, novelty
from loragen.core.generator.model import Generator


def dense(adapter):
    """ΔW of every module, as the definition says."""
    scale = adapter.config["lora_alpha"] / adapter.config["r"]
    return torch.cat(
        [
            (scale * adapter.tensors[key.replace("lora_A", "lora_B")] @ tensor).flatten()
            for key, tensor in sorted(adapter.tensors.items())
            if "lora_A" in key
        ]
    ).double()


def test_distances_are_those_of_the_dense_matrices(bench):
    made = bench()
    files = [source.checkpoints[-1] for source in made.sources]
    checkpoints = [read_checkpoint(file) for file in files]
    adapters = [Adapter(one.config, one.tensors) for one in checkpoints]
    found = Gallery(adapters).distances(checkpoints[1].deltas())
    expected = float((dense(adapters[0]) - dense(adapters[1])).norm())
    assert found == pytest.approx([expected, 0.0], rel=1e-4, abs=1e-6)


def test_an_adapter_that_repeats_a_checkpoint_is_not_new(bench, targets, monkeypatch):
    made = bench()
    copied = made.sources[1].checkpoints[2]
    read = read_checkpoint(copied)
    monkeypatch.setattr(Generator, "generate", lambda *_: Adapter(read.config, read.tensors))
    one = novelty(made, targets).novelties[0]
    assert one.nearest == f"{made.sources[1].name}/{copied.stem}"
    assert one.to_nearest == pytest.approx(0, abs=1e-5)
    assert one.to_mean > 0.01


def test_the_spread_of_a_dataset_is_that_of_its_own_checkpoints(bench, targets):
    spread = novelty(bench(), targets)
    assert 0 < spread.within < min(one.to_mean + one.to_nearest for one in spread.novelties)
    assert set(spread.as_dict()["groups"]) == {"all"}
