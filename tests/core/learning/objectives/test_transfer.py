from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loragen.core.learning.arrays import SourceArrays
from loragen.core.learning.data import PairBatch, Split
from loragen.core.learning.objectives.transfer import Transfer, TransferBatches
from loragen.core.protocols import SupportSet
from tests.core.learning.objectives.test_behaviour import arrays, batches, equal

DATASETS = 3


class Network(torch.nn.Module):
    """Remembers what it was asked and fitted to."""

    def __init__(self):
        super().__init__()
        self.register_buffer("condition_mean", torch.zeros(1))
        self.fitted = []

    def predict(self, *arguments):
        return arguments

    def fit(self, conditions):
        self.fitted.append((list(conditions), self.training))


class Known(Transfer):
    """Without a base model."""

    def __init__(self, sources):
        config = SimpleNamespace(data=SimpleNamespace(prompts_per_condition=2))
        self.data = SimpleNamespace(sources=sources, config=config)


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


def test_an_adapter_is_predicted_from_the_support_set(transfer):
    support = SupportSet(
        torch.ones(2, 1, 1, 2),
        torch.ones(2, 1, 1, dtype=bool),
        torch.tensor([0, 2]),
        torch.tensor([[False, True]]),
    )
    condition, mask = torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, dtype=bool)
    batch = PairBatch(condition, mask, torch.zeros(1, 4, 2), support=support)
    asked = transfer.predict(Network(), batch)
    assert asked[0] is condition and asked[1] is mask and asked[2] is support


@pytest.mark.parametrize("own", [0, 2, None])
def test_validation_leaves_the_dataset_of_the_prompts_out(transfer, own):
    condition, mask = torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, dtype=torch.bool)
    batch = PairBatch(condition, mask, torch.zeros(1, 4, 2), source=own)
    *_, (known, known_mask, support, left_out) = transfer.predict_for_validation(Network(), batch)
    assert known.shape == (DATASETS, 2, 1, 2) and known_mask.all()
    assert [one.unique().tolist() for one in known] == [[0], [1], [2]]
    assert support.tolist() == [0, 1, 2]
    assert left_out.tolist() == [[index == own for index in range(DATASETS)]]


def test_a_pass_over_the_collection_predicts_several_left_out_adapters(transfer):
    """Twenty datasets in three passes: the first eight, the next eight, the last four."""

    class LeftOut(Network):
        def predict(self, condition, mask, support):
            self.fitted.append(len(condition))
            assert (
                condition[:, 0, 0, 0]
                .div(100, rounding_mode="floor")
                .sub(1)
                .equal(support.left_out.int().argmax(1))
            )
            return support.left_out.float()[:, None]  # (adapters, 1, datasets)

    class Base:
        """Answers one row right with the adapter of the dataset that asks, else none."""

        normalization = SimpleNamespace(normalize=lambda own: own.new_zeros(1, 20))

        def accuracy(self, predicted, rows):
            right = predicted[0, 0, asked[len(judged) // 2]]
            judged.append(float(right))
            return None, right

    asked, judged = range(20), []
    transfer.data.sources = [arrays(i + 1) for i in range(20)]
    transfer.data.collate = lambda _: torch.zeros(0)
    transfer.base_loss = Base()
    network = LeftOut()
    assert transfer.accuracy_on_left_out(network) == (1.0, 0.0)
    assert network.fitted == [8, 8, 4]
    assert judged == [1.0, 0.0] * 20


def test_it_is_fitted_to_all_of_them_without_dropout(transfer):
    network = Network().train()
    transfer.finalize(network)
    ((conditions, training),) = network.fitted
    assert [condition.unique().tolist() for condition, _ in conditions] == [[0], [1], [2]]
    assert not training
    assert network.training


@settings(max_examples=25)
@given(st.integers(0, 4), st.integers(1, 3), st.integers(1, 2), st.integers(0, 20))
def test_each_adapter_leaves_its_own_dataset_out_and_no_other(more, pairs, accumulation, k):
    datasets = 2 * pairs + more
    sources = [arrays(i + 1) for i in range(datasets)]
    ours = {"kind": TransferBatches, "batch_size": 2 * pairs}
    first, second = (batches(sources, **ours, split=Split(accumulation, i, 2))[k] for i in range(2))
    for half in (first, second):
        own = [int(one) // 100 - 1 for one in half.tokens[:, 0, 0]]
        assert half.support.datasets.tolist() == list(range(datasets))
        assert (half.support.condition[:, 0, 0, 0] // 100 - 1).tolist() == list(range(datasets))
        assert half.support.left_out.int().argmax(1).tolist() == own
        assert half.support.left_out.sum(1).eq(1).all()
    assert all(a.equal(b) for a, b in zip(first.support[:3], second.support[:3], strict=True))


def test_another_source_of_what_is_left_out_is_left_out_too():
    sources = [replace(arrays(i + 1), prompts_sha256=f"dataset {i // 2}") for i in range(8)]
    found = batches(sources, kind=TransferBatches, batch_size=2)
    for k in range(6):
        own = [(int(one) // 100 - 1) // 2 for one in found[k].tokens[:, 0, 0]]
        for dataset, left_out in zip(own, found[k].support.left_out, strict=True):
            assert left_out.nonzero()[:, 0].tolist() == [2 * dataset, 2 * dataset + 1]


def test_a_support_set_may_be_limited():
    found = batches([arrays(i + 1) for i in range(8)], kind=TransferBatches, batch_size=2)
    found.max_support = 3
    chosen = {tuple(found[k].support.datasets.tolist()) for k in range(9)}
    assert {len(one) for one in chosen} == {3}
    assert len(chosen) > 3


def test_a_dataset_with_several_runs_counts_once_in_a_limited_support_set():
    sources = [replace(arrays(i + 1), prompts_sha256=f"dataset {i // 2}") for i in range(6)]
    found = batches(sources, kind=TransferBatches)
    found.max_support = 2
    for k in range(9):
        support = found[k].support
        assert len(support.datasets) == 4
        assert not support.left_out.all(dim=1).any()


def test_a_transfer_batch_has_the_adapters_and_rows_of_any_other():
    sources = [arrays(i + 1) for i in range(6)]
    plain, transfer = batches(sources), batches(sources, kind=TransferBatches)
    assert equal(plain[3], transfer[3])
    assert plain[3].support is None
