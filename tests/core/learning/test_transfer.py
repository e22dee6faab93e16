"""What a transfer knows of its datasets."""

import numpy as np
import pytest
import torch

from loragen.core.learning.arrays import SourceArrays
from loragen.core.learning.batches import Others
from loragen.core.learning.objectives.transfer import KnownDatasets

DATASETS = 3


class Samples:
    """Two adapters of each dataset."""

    datasets = (0, 0, 1, 1, 2, 2)


class Network(torch.nn.Module):
    """Remembers what it was fitted to."""

    def __init__(self):
        super().__init__()
        self.register_buffer("condition_mean", torch.zeros(1))
        self.calls, self.fitted = 0, []

    @property
    def transfers(self):
        return self

    def coordinates(self, samples):
        self.calls += 1
        return torch.tensor([[1.0, 0], [3, 0], [5, 2], [5, 4], [0, 0], [8, 8]])

    def predict(self, condition, mask, known, known_mask, targets):
        return condition, known, targets

    def fit_known(self, known, targets):
        self.fitted.append((list(known), targets, self.training))


@pytest.fixture
def known():
    sources = [
        SourceArrays(
            f"dataset {i}",
            np.zeros((2, 4, 2), np.float32),
            np.full((4, 1, 2), float(i), np.float32),
            np.ones((4, 1), bool),
        )
        for i in range(DATASETS)
    ]
    return KnownDatasets(sources, [range(3)] * DATASETS, Samples())


MEANS = torch.tensor([[2.0, 0], [5, 3], [4, 4]])


def test_coordinates_are_the_mean_of_a_datasets_adapters(known):
    network = Network()
    assert known.coordinates(network).equal(MEANS)
    assert known.coordinates(network).equal(MEANS)
    assert network.calls == 1


def test_coordinates_are_where_the_network_is(known):
    """A trainer takes it to a device and back before the last checkpoint is saved."""
    network = Network()
    known.coordinates(network)
    assert known.coordinates(network.to("meta")).device.type == "meta"


def test_an_adapter_is_written_from_the_others_alone(known):
    others = Others(torch.ones(2, 1, 1, 2), torch.ones(2, 1, 1, dtype=bool), torch.tensor([0, 2]))
    condition, mask = torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, dtype=bool)
    own, found, targets = known.written(Network(), condition, mask, others)
    assert own.equal(condition)
    assert found.equal(others.condition)
    assert targets.equal(MEANS[[0, 2]])


def test_it_is_fitted_to_all_of_them_without_dropout(known):
    network = Network().train()
    known.settle(network)
    ((conditions, targets, training),) = network.fitted
    assert [condition.unique().tolist() for condition, _ in conditions] == [[0], [1], [2]]
    assert targets.equal(MEANS)
    assert not training
    assert network.training
