import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loragen.core.plugins import create, find
from loragen.core.protocols import SupportSet
from loragen.plugins.decoders import combination
from loragen.plugins.decoders.mixture import Ridge
from loragen.testing import check_decoder, grid
from tests.plugins.test_decoders import assert_each_part_matters

DATASETS, DIM = 6, 5


class Adapters:
    def __init__(self, values):
        self.values, self.shape, self.asked = values, tuple(values.shape), []

    def read(self, datasets, tokens):
        self.asked += datasets
        return self.values[list(datasets), tokens]

    def __getitem__(self, tokens):
        return self.values[:, tokens]


def fitted(values=None, **options):
    """A decoder that knows six datasets, each by its own prompts."""
    torch.manual_seed(0)
    shape = grid()
    module = create("decoder", "mixture", {"hidden_dim": 16, **options}, DIM, shape)
    if values is None:
        values = torch.randn(DATASETS, shape.tokens, shape.token_dim)
    module.use_adapters(Adapters(values))
    module.fit(known_datasets())
    return module.eval()


def known_datasets():
    chance = torch.Generator().manual_seed(1)
    mask = torch.ones(1, 3, 1, dtype=torch.bool)
    return [(torch.randn(1, 3, 1, DIM, generator=chance), mask) for _ in range(DATASETS)]


def coefficients(known, query, left_out=(), penalty=0.3):
    """``[M]``: those of one query, for one group."""
    module = Ridge(1)
    torch.nn.init.constant_(module.log_penalty, math.log(penalty))
    mask = torch.zeros(1, len(known), dtype=torch.bool)
    mask[0, list(left_out)] = True
    return module(query[None], known, mask)[0, 0].detach()


@pytest.mark.parametrize("share", ["adapter", "layer", "kind", "cell"])
def test_contract(share):
    check_decoder(find("decoder", "mixture"), hidden_dim=8, share=share)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 7), st.integers(1, 5), st.floats(0.01, 10), st.integers(0, 99))
def test_ridge_is_the_regression_of_the_textbook(datasets, features, penalty, seed):
    """Centred features and targets, in the primal form; the intercept is not penalised."""
    chance = torch.Generator().manual_seed(seed)
    known = torch.randn(datasets, features, generator=chance, dtype=torch.float64)
    targets = torch.randn(datasets, 3, generator=chance, dtype=torch.float64) + 5
    query = torch.randn(features, generator=chance, dtype=torch.float64)
    x, y = known - known.mean(0), targets - targets.mean(0)
    system = x.T @ x + penalty * features * torch.eye(features, dtype=torch.float64)
    expected = targets.mean(0) + (query - known.mean(0)) @ torch.linalg.solve(system, x.T @ y)
    found = coefficients(known, query, penalty=penalty)
    assert (found @ targets).allclose(expected, rtol=1e-6)


@pytest.mark.parametrize("left_out", [(), (1,), (0, 3)])
def test_what_is_the_same_in_all_adapters_is_predicted(left_out):
    """A coordinate that is 1.0 in every known dataset is 1.0: the coefficients sum to 1."""
    known, query = torch.randn(5, 8), 10 * torch.randn(8)
    found = coefficients(known, query, left_out)
    assert float(found.sum()) == pytest.approx(1, abs=1e-5)
    assert not found[list(left_out)].any()


def test_leaving_out_is_never_having_had():
    known, query = torch.randn(5, 8), torch.randn(8)
    without = torch.cat([known[:2], known[3:]])
    found = coefficients(known, query, left_out=[2])
    expected = coefficients(without, query)
    assert torch.cat([found[:2], found[3:]]).allclose(expected, atol=1e-6)
    replaced = known.clone()
    replaced[2] = 100 * torch.randn(8)
    assert coefficients(replaced, query, left_out=[2]).equal(found)


def test_ridge_goes_from_the_data_to_the_mean():
    known = torch.randn(4, 8)
    assert coefficients(known, known[1], penalty=1e-4).allclose(torch.eye(4)[1], atol=1e-2)
    assert coefficients(known, known[1], penalty=1e4).allclose(torch.full((4,), 0.25), atol=1e-2)


@pytest.mark.parametrize(("share", "groups"), [("adapter", 1), ("layer", 2), ("cell", 8)])
def test_each_group_of_tokens_is_combined_by_its_own_coefficients(share, groups, monkeypatch):
    monkeypatch.setattr(combination, "CHUNK", 50)  # in many pieces
    module, shape = fitted(share=share), grid()
    with torch.no_grad():
        module.ridge.log_penalty.copy_(torch.linspace(-2, 1, groups))
    condition, mask = known_datasets()[0]
    shares = module._coefficients(condition, mask)[0]  # (G, N)
    assert shares.shape == (groups, DATASETS)
    axes = {"adapter": [], "layer": ["layer"], "cell": ["layer", "module", "matrix"]}[share]
    codes = np.stack([getattr(shape, axis) for axis in axes or ["layer"]])
    group = np.unique(codes, axis=1, return_inverse=True)[1] if axes else np.zeros(24, int)
    expected = torch.einsum("tn,ntd->td", shares[group.reshape(-1)], module.combine.adapters.values)
    assert module(condition, mask)[0].allclose(expected, atol=1e-5)


def test_the_gradient_is_that_of_the_sum(monkeypatch):
    monkeypatch.setattr(combination, "CHUNK", 50)
    module = fitted(share="layer")
    values = module.combine.adapters.values.double()
    module.combine.adapters.values = values
    given = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c: module.combine(c, [0, 2, 5]), given)


def test_only_adapters_that_count_are_read():
    module = fitted()
    shares = torch.zeros(1, 1, DATASETS)
    shares[0, 0, [1, 4]] = 0.5
    made = module.combine(shares, range(DATASETS))
    assert sorted(set(module.combine.adapters.asked)) == [1, 4]
    assert made[0].allclose(module.combine.adapters.values[[1, 4]].mean(0))


def test_before_it_is_fitted_it_gives_the_mean():
    shape = grid()
    module = create("decoder", "mixture", {"hidden_dim": 16}, DIM, shape)
    values = torch.randn(DATASETS, shape.tokens, shape.token_dim)
    module.use_adapters(Adapters(values))
    made = module(torch.randn(1, 2, 1, DIM), torch.ones(1, 2, 1, dtype=torch.bool))
    assert made[0].allclose(values.mean(0), atol=1e-6)


def test_each_trained_part_matters():
    """After a few steps: the hidden layer of the reading starts at zero."""
    module = fitted().train()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    known = torch.cat([condition for condition, _ in known_datasets()])
    mask = torch.ones(DATASETS, 3, 1, dtype=torch.bool)
    own = torch.eye(DATASETS, dtype=torch.bool)
    target = module.combine.adapters.values

    def predicted():
        return module.predict(known, mask, SupportSet(known, mask, torch.arange(DATASETS), own))

    for _ in range(5):
        optimizer.zero_grad()
        (predicted() - target).square().mean().backward()
        optimizer.step()
    assert_each_part_matters(module, predicted)

    def generated():
        module.fit(zip(known.split(1), mask.split(1), strict=True))
        return module(known + 0.5, mask)

    assert_each_part_matters(module, generated)
