from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loragen.core.learning.arrays import SourceArrays
from loragen.core.learning.data import PairBatch, Split, SupportSet
from loragen.core.learning.objectives.transfer import Transfer, TransferBatches
from tests.core.learning.objectives.test_behaviour import arrays, batches, equal

DATASETS = 3
MEANS = torch.tensor([[2.0, 0], [5, 3], [4, 4]])


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
    def decoder(self):
        return self

    def coordinates(self, samples):
        self.calls += 1
        return torch.tensor([[1.0, 0], [3, 0], [5, 2], [5, 4], [0, 0], [8, 8]])

    def predict(self, condition, mask, known, known_mask, targets):
        return condition, known, targets

    def fit_transfer(self, known, targets):
        self.fitted.append((list(known), targets, self.training))


class Known(Transfer):
    """Without a base model."""

    def __init__(self, sources):
        self.data, self.samples = SimpleNamespace(sources=sources), Samples()
        self._coordinates = None


@pytest.fixture
def transfer():
    return Known([
        SourceArrays(
            f"dataset {i}",
            np.zeros((2, 4, 2), np.float32),
            np.full((4, 1, 2), float(i), np.float32),
            np.ones((4, 1), bool),
            train_texts=range(3),
        )
        for i in range(DATASETS)
    ])  # fmt: skip


def test_coordinates_are_the_mean_of_a_datasets_adapters(transfer):
    network = Network()
    assert transfer.coordinates(network).equal(MEANS)
    assert transfer.coordinates(network).equal(MEANS)
    assert network.calls == 1


def test_coordinates_are_where_the_network_is(transfer):
    """A trainer takes it to a device and back before the last checkpoint is saved."""
    network = Network()
    transfer.coordinates(network)
    assert transfer.coordinates(network.to("meta")).device.type == "meta"


def test_an_adapter_is_predicted_from_the_others_alone(transfer):
    others = SupportSet(
        torch.ones(2, 1, 1, 2), torch.ones(2, 1, 1, dtype=bool), torch.tensor([0, 2])
    )
    condition, mask = torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, dtype=bool)
    batch = PairBatch(condition, mask, torch.zeros(1, 4, 2), support=others)
    own, found, targets = transfer.predict(Network(), batch)
    assert own.equal(condition)
    assert found.equal(others.condition)
    assert targets.equal(MEANS[[0, 2]])


def test_it_is_fitted_to_all_of_them_without_dropout(transfer):
    network = Network().train()
    transfer.finalize(network)
    ((conditions, targets, training),) = network.fitted
    assert [condition.unique().tolist() for condition, _ in conditions] == [[0], [1], [2]]
    assert targets.equal(MEANS)
    assert not training
    assert network.training


@settings(max_examples=25)
@given(st.integers(0, 4), st.integers(1, 3), st.integers(1, 2), st.integers(0, 20))
def test_the_others_are_all_datasets_that_no_process_has_an_adapter_of(
    more, pairs, accumulation, k
):
    datasets = 4 * pairs + more
    sources = [arrays(i + 1) for i in range(datasets)]
    ours = {"kind": TransferBatches, "batch_size": 2 * pairs}
    first, second = (batches(sources, **ours, split=Split(accumulation, i, 2))[k] for i in range(2))
    left_out = {int(one) // 100 - 1 for half in (first, second) for one in half.tokens[:, 0, 0]}
    assert set(first.support.datasets.tolist()) == set(range(datasets)) - left_out
    assert (
        first.support.condition[:, 0, 0, 0] // 100 - 1
    ).tolist() == first.support.datasets.tolist()
    assert all(a.equal(b) for a, b in zip(first.support, second.support, strict=True))


def test_another_source_of_what_is_left_out_is_left_out_too():
    sources = [replace(arrays(i + 1), prompts_sha256=f"dataset {i // 2}") for i in range(8)]
    found = batches(sources, kind=TransferBatches, batch_size=2)
    for k in range(6):
        left_out = {(int(one) // 100 - 1) // 2 for one in found[k].tokens[:, 0, 0]}
        others = {index // 2 for index in found[k].support.datasets.tolist()}
        assert others == set(range(4)) - left_out


def test_a_transfer_batch_has_the_adapters_and_rows_of_any_other():
    sources = [arrays(i + 1) for i in range(6)]
    plain, transfer = batches(sources), batches(sources, kind=TransferBatches)
    assert equal(plain[3], transfer[3])
    assert plain[3].support is None
