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


class Transfers:
    def __init__(self):
        self.told, self.settled = 0, []

    def coordinates(self, samples):
        self.told += 1
        return torch.tensor([[1.0, 0], [3, 0], [5, 2], [5, 4], [0, 0], [8, 8]])

    def transferred(self, features, known, coordinates):
        return features, known, coordinates

    def settle(self, known, coordinates):
        self.settled.append((known, coordinates))


class Network(torch.nn.Module):
    """Its features are the mean of what it reads."""

    def __init__(self):
        super().__init__()
        self.transfers = Transfers()
        self.register_buffer("condition_mean", torch.zeros(1))
        self.modes = []

    def features(self, condition, mask):
        self.modes.append(self.training)
        return (condition * mask[..., None]).sum((1, 2)) / mask.sum((1, 2))[:, None]


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
    assert network.transfers.told == 1


def test_coordinates_are_where_the_network_is(known):
    """A trainer takes it to a device and back before the last checkpoint is saved."""
    network = Network()
    known.coordinates(network)
    assert known.coordinates(network.to("meta")).device.type == "meta"


def test_an_adapter_is_written_from_the_others_alone(known):
    others = Others(torch.ones(2, 1, 1, 2), torch.ones(2, 1, 1, dtype=bool), torch.tensor([0, 2]))
    condition, mask = torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, dtype=bool)
    features, told, coordinates = known.written(Network(), condition, mask, others)
    assert features.equal(torch.zeros(1, 2))
    assert told.equal(torch.ones(2, 2))
    assert coordinates.equal(MEANS[[0, 2]])


def test_it_settles_on_all_of_them_without_dropout(known):
    network = Network().train()
    known.settle(network)
    ((features, coordinates),) = network.transfers.settled
    assert features.equal(torch.tensor([[0.0, 0], [1, 1], [2, 2]]))
    assert coordinates.equal(MEANS)
    assert network.training
    assert not any(network.modes)
