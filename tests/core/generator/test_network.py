import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from loragen.core.adapter.layout import Layout
from loragen.core.errors import UsageError
from loragen.core.generator.network import Network, new_network
from loragen.core.protocols import Samples

LAYOUT = Layout.of({"m.layers.0.q.lora_A.weight": torch.zeros(2, 4)}, token_dim=4)


class Echo(nn.Module):
    """Answers with what it is shown."""

    def forward(self, condition, mask):
        return condition


class Curious(Echo):
    seen: Samples | None = None

    def start_from(self, samples):
        self.seen = samples


def embedded(texts, seed, offset=0.0, positions=3, dim=5):
    """Embeddings whose padding is far off, and the mask."""
    random = np.random.default_rng(seed)
    mask = np.arange(positions) < random.integers(1, positions + 1, (texts, 1))
    values = offset + (1 + seed) * random.standard_normal((texts, positions, dim))
    return np.where(mask[..., None], values, 1e6).astype(np.float32), mask


@settings(max_examples=25)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.floats(-50, 50))
def test_conditions_have_no_mean_and_unit_spread_each_dataset_weighing_the_same(sizes, offset):
    datasets = [embedded(texts, seed, offset) for seed, texts in enumerate(sizes)]
    network = Network(Echo(), 5)
    network.fit_conditions(datasets)
    means, squares = [], []
    for values, mask in datasets:
        standard = network(torch.from_numpy(values), torch.from_numpy(mask))
        valid = standard[torch.from_numpy(mask)].double()
        means.append(valid.mean(0))
        squares.append(valid.square().mean(0))
    assert torch.stack(means).mean(0).abs().max() < 1e-3
    if sum(mask.sum() for _, mask in datasets) > 1:
        assert torch.allclose(torch.stack(squares).mean(0).sqrt(), torch.tensor(1.0).double(), 1e-2)


def test_a_dimension_that_never_changes_stays_finite():
    network = Network(Echo(), 2)
    network.fit_conditions([(np.ones((4, 1, 2), np.float32), np.ones((4, 1), dtype=bool))])
    condition = torch.ones(1, 4, 1, 2)
    assert network(condition, torch.ones(1, 4, 1, dtype=torch.bool)).eq(0).all()


def test_the_scale_is_kept_with_the_weights():
    one, other = Network(Echo(), 5), Network(Echo(), 5)
    one.fit_conditions([embedded(9, 1, offset=3.0)])
    other.load_state_dict(one.state_dict())
    assert other.condition_mean.equal(one.condition_mean)
    assert other.condition_spread.equal(one.condition_spread)


def test_samples_are_shown_to_decoders_that_care():
    class Few:
        shape = (1, 2, 4)

        def __getitem__(self, tokens):
            return torch.zeros(1, 2, 4)[:, tokens]

    curious, samples = Curious(), Few()
    Network(curious, 5).start_from(samples)
    assert curious.seen is samples
    Network(Echo(), 5).start_from(samples)  # has no such method, and is left alone


def test_options_that_do_not_suit_the_layout_are_a_mistake_of_the_user():
    shapes = {"shapes": [(1, 1, 2), (1, 1, 2)]}
    with pytest.raises(UsageError, match=r"decoder hyperconv: the last map \[1, 1, 2\] has 2"):
        new_network("hyperconv", shapes, 5, LAYOUT)
