"""The intervals of mean accuracies, and the novelty of generated adapters."""

from statistics import fmean

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loragen.core.adapter.files import Adapter
from loragen.core.analysis.checkpoints import read_checkpoint
from loragen.core.evaluation.statistics import DeltaSet, interval, novelty
from loragen.core.generator.model import Generator

shares = st.floats(0, 1)
MANY = 10**9  # rows, so many that their binomial error vanishes
tables = st.lists(st.lists(shares, min_size=2, max_size=5), min_size=1, max_size=5)


def test_one_dataset_is_the_textbook_t_interval_over_draws():
    low, high = interval([[0.5, 0.6, 0.7, 0.8, 0.9]], [MANY])
    half = 2.7764451 * 0.15811388 / 5**0.5  # t(0.975, 4), the sample's standard deviation
    assert (low, high) == pytest.approx((0.7 - half, 0.7 + half))


def test_several_datasets_count_by_the_spread_of_their_means():
    low, high = interval([[0.2, 0.2], [0.4, 0.4], [0.6, 0.6]], [MANY] * 3)
    half = 4.3026527 * 0.2 / 3**0.5  # t(0.975, 2)
    assert (low, high) == pytest.approx((max(0, 0.4 - half), 0.4 + half))


def test_means_that_agree_by_luck_do_not_hide_the_draws():
    low, high = interval([[0.4, 0.6], [0.6, 0.4]], [MANY] * 2)
    assert high - low > 0.1


def test_a_single_number_says_nothing_of_its_own_chance():
    assert interval([[0.5]], [MANY]) == (0.0, 1.0)


def test_draws_that_agree_leave_the_chance_of_the_rows():
    """One dataset, 98 rows of which 49 are right in every draw: the binomial error of (49 + 1) of
    (98 + 2)."""
    low, high = interval([[0.5] * 5], [98])
    assert (low, high) == pytest.approx((0.5 - 1.959964 * 0.05, 0.5 + 1.959964 * 0.05))


def test_all_right_is_not_certain():
    low, high = interval([[1.0] * 5], [32])
    assert 0.9 < low < 0.97
    assert high == 1.0
    assert interval([[1.0] * 5], [320]).low > low


@given(tables)
def test_the_mean_is_inside_and_all_within_0_and_1(scores):
    low, high = interval(scores, [9] * len(scores))
    mean = fmean(fmean(draws) for draws in scores)
    assert -1e-12 <= low <= mean + 1e-12
    assert mean - 1e-12 <= high <= 1 + 1e-12


@given(tables)
def test_neither_the_order_of_datasets_nor_of_draws_matters(scores):
    turned = [draws[::-1] for draws in reversed(scores)]
    assert interval(turned, [9] * len(scores)) == pytest.approx(interval(scores, [9] * len(scores)))


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


def test_distances_are_those_of_the_dense_matrices(setup):
    shared = setup()
    checkpoints = [
        read_checkpoint(source.checkpoints[-1], source.adapter_config) for source in shared.sources
    ]
    adapters = [Adapter(one.config, one.tensors) for one in checkpoints]
    found = DeltaSet(adapters).distances(checkpoints[1].deltas())
    expected = float((dense(adapters[0]) - dense(adapters[1])).norm())
    assert found == pytest.approx([expected, 0.0], rel=1e-4, abs=1e-6)


def test_an_adapter_that_repeats_a_checkpoint_is_not_new(setup, targets, monkeypatch):
    shared = setup()
    copied = shared.sources[1].checkpoints[2]
    read = read_checkpoint(copied, shared.sources[1].adapter_config)
    monkeypatch.setattr(Generator, "generate", lambda *_: Adapter(read.config, read.tensors))
    one = novelty(shared, targets).novelties[0]
    assert one.nearest == f"{shared.sources[1].name}/{copied.stem}"
    assert one.to_nearest == pytest.approx(0, abs=1e-5)
    assert one.to_mean > 0.01


def test_the_spread_of_a_dataset_is_that_of_its_own_checkpoints(setup, targets):
    spread = novelty(setup(), targets)
    assert 0 < spread.within < min(one.to_mean + one.to_nearest for one in spread.novelties)
    assert set(spread.as_dict()["groups"]) == {"all"}
