# ruff: noqa: ARG005  # a stand-in ignores what the real one would use

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from loragen.core.adapter.layout import Layout
from loragen.core.config import GenTrainConfig
from loragen.core.generator.network import Normalization
from loragen.core.learning.arrays import SourceArrays
from loragen.core.learning.data import TrainingData
from loragen.core.learning.objectives.reconstruction import Reconstruction
from loragen.core.protocols import Metric, Objective
from loragen.testing import check_objective

from .stand_ins import Options, variant

LAYOUT = Layout.of({"m.layers.0.q.lora_A.weight": torch.zeros(2, 4)}, token_dim=4)


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, LAYOUT.tokens * LAYOUT.token_dim)

    def forward(self, condition, mask):
        return self.linear(condition.mean((1, 2))).view(-1, LAYOUT.tokens, LAYOUT.token_dim)


def source(seed):
    random = np.random.default_rng(seed)
    return SourceArrays(
        f"source {seed}",
        random.standard_normal((3, LAYOUT.tokens, LAYOUT.token_dim)).astype(np.float32),
        random.standard_normal((6, 1, 5)).astype(np.float32),
        np.ones((6, 1), dtype=bool),
        train_texts=range(6),
        val_texts=range(0),
    )


@pytest.fixture
def data():
    sources = [source(1), source(2)]
    config = GenTrainConfig(training={"objective": "reconstruction"}, data={"batch_size": 4})
    fitted = Normalization.fit(LAYOUT, [one.tokens for one in sources])
    return TrainingData(config, LAYOUT, fitted, {}, sources)


class Distance(Objective):
    Config = Options

    def __init__(self, options, data):
        self.data, self.steps, self.learning_rate, self.batch_size = data, 4, 1e-3, 4
        self.metric = Metric("distance", "the distance")

    def batches(self, process_index, num_processes):
        return self.data.pairs(process_index, num_processes)

    def loss(self, network, batch):
        loss = (network(batch.condition, batch.mask) - batch.tokens).square().mean()
        return loss, {"loss": loss.detach()}

    def validate(self, network, batch):
        return {"distance": self.loss(network, batch)[0]}


@pytest.mark.parametrize("cls", [Distance, Reconstruction])
def test_a_correct_objective_passes(cls, data):
    check_objective(cls, data, Linear())


def attached(self, network, batch):
    loss = Distance.loss(self, network, batch)[0]
    return loss, {"loss": loss}


def changed(change):
    def loss(self, network, batch):
        return change(*Distance.loss(self, network, batch))

    return loss


class Random:
    def __getitem__(self, index):
        tokens = torch.randn(4, LAYOUT.tokens, LAYOUT.token_dim)
        mask = torch.ones(4, 1, 1, dtype=torch.bool)
        return SimpleNamespace(condition=torch.ones(4, 1, 1, 5), mask=mask, tokens=tokens)


@pytest.mark.parametrize(
    "attributes, message",
    [
        ({"steps": property(lambda self: 0, lambda self, value: None)}, "steps is 0"),
        ({"metric": property(lambda self: "loss", lambda self, value: None)}, "no Metric"),
        ({"batches": lambda self, *_: Random()}, "another tokens the second time"),
        ({"batch_size": property(lambda self: 5, lambda self, value: None)}, "has 4 pairs"),
        ({"batches": lambda self, *_: self.data.pairs()}, r"as \[4, 4\]"),
        ({"loss": changed(lambda loss, metrics: (loss.detach(), metrics))}, "no gradient"),
        ({"loss": changed(lambda loss, metrics: (loss / 0, metrics))}, "finite scalar"),
        ({"loss": changed(lambda loss, metrics: (loss, {}))}, "no 'loss' among"),
        ({"loss": changed(lambda loss, metrics: (0 * loss, metrics))}, "reaches no parameter"),
        ({"loss": attached}, "metrics with gradients"),
        ({"validate": lambda self, *_: {"loss": 0.0}}, "without its metric 'distance'"),
        ({"validate": lambda self, *_: {"distance": float("nan")}}, "not finite"),
    ],
)
def test_a_broken_contract_is_named(attributes, message, data):
    with pytest.raises(AssertionError, match=message):
        check_objective(variant(Distance, **attributes), data, Linear())
