from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loragen.core.adapter.layout import Layout
from loragen.core.config import GenTrainConfig
from loragen.core.generator.network import Normalization, importance
from loragen.core.learning.objectives import reconstruction as module
from loragen.core.learning.objectives.reconstruction import (
    Reconstruction,
    ReconstructionError,
    WeightedError,
)

LAYOUT = Layout.of(
    {
        "m.layers.0.q.lora_A.weight": torch.zeros(2, 5),
        "m.layers.0.q.lora_B.weight": torch.zeros(3, 2),
    },
    token_dim=4,
)
SHAPE = (LAYOUT.tokens, LAYOUT.token_dim)


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def normalization(seed=0):
    mean = drawn(seed, *SHAPE) * LAYOUT.mask()
    return Normalization(mean, drawn(seed + 1, LAYOUT.tokens, 1).abs() + 0.1)


def reconstruction(weights=None, **options):
    return ReconstructionError(
        SimpleNamespace(
            config=GenTrainConfig(training=options),
            layout=LAYOUT,
            normalization=normalization(),
            token_weights=torch.ones(LAYOUT.tokens, 1) if weights is None else weights,
        )
    )


class TestReconstruction:
    @settings(max_examples=20)
    @given(st.integers(1, 4), st.floats(0, 3), st.floats(0, 3))
    def test_it_is_the_weighed_sum_of_both_errors_over_the_values(self, batch, mse, l1):
        predicted, target = drawn(3, batch, *SHAPE), drawn(4, batch, *SHAPE)
        loss, logged = reconstruction(mse_weight=mse, l1_weight=l1)(predicted, target)
        error = (predicted - normalization().normalize(target))[:, LAYOUT.mask()]
        assert error.shape == (batch, LAYOUT.values)
        assert logged["mse"] == pytest.approx(error.square().mean().item(), rel=1e-5)
        assert logged["l1"] == pytest.approx(error.abs().mean().item(), rel=1e-5)
        wanted = mse * error.square().mean() + l1 * error.abs().mean()
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)

    def test_weights_count_token_by_token(self):
        weights = torch.linspace(0.5, 1.5, LAYOUT.tokens)[:, None]
        predicted, target = drawn(3, 2, *SHAPE), drawn(4, 2, *SHAPE)
        error = predicted - normalization().normalize(target)
        wanted = (weights * error.square())[:, LAYOUT.mask()].mean()
        loss = reconstruction(weights, l1_weight=0.0)(predicted, target)[0]
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)

    def test_padding_has_no_part(self):
        error_of, padding = reconstruction(), ~LAYOUT.mask()
        assert padding.any()
        predicted, target = drawn(3, 2, *SHAPE), drawn(4, 2, *SHAPE)
        other, wrong = predicted.clone(), target.clone()
        other[:, padding], wrong[:, padding] = 1e6, -1e6
        predicted.requires_grad_()
        loss = error_of(predicted, target)[0]
        assert loss.equal(error_of(other, wrong)[0])
        loss.backward()
        assert predicted.grad[:, padding].eq(0).all()
        assert predicted.grad[:, ~padding].ne(0).all()
        for name, value in error_of.metrics(other, wrong).items():
            assert value.equal(error_of.metrics(predicted, target)[name]), name

    def test_noise_is_on_the_target_only_where_it_is_asked_for(self):
        error_of = reconstruction(l1_weight=0.0)
        target = drawn(4, 4000, *SHAPE)
        exact = normalization().normalize(target)
        assert error_of(exact, target)[0] == 0
        assert error_of(exact, target, noise=0.5)[0] == pytest.approx(0.25, rel=0.05)

    def test_errors_in_own_units_are_those_of_the_weights(self):
        error_of, predicted, target = reconstruction(), drawn(3, 2, *SHAPE), drawn(4, 2, *SHAPE)
        found = error_of.metrics(predicted, target)
        made = normalization().denormalize(predicted)
        error, wanted = (made - target)[:, LAYOUT.mask()], target[:, LAYOUT.mask()]
        assert found["mae"] == pytest.approx(error.abs().mean().item(), rel=1e-4)
        assert found["rmse"] == pytest.approx(error.square().mean().sqrt().item(), rel=1e-4)
        assert found["relative_error"] == pytest.approx((error.norm() / wanted.norm()).item(), 1e-4)


@pytest.mark.parametrize(
    ("settings", "steps"), [({}, 20), ({"max_steps": 7}, 7), ({"max_steps": 99}, 20)]
)
def test_its_steps_are_epochs_or_fewer(settings, steps):
    config = GenTrainConfig(training={"max_epochs": 4, **settings})
    weights, pairs = torch.ones(LAYOUT.tokens, 1), SimpleNamespace(steps_per_epoch=5)
    data = SimpleNamespace(config=config, layout=LAYOUT, normalization=None, token_weights=weights)
    data.pairs = lambda: pairs
    assert Reconstruction(Reconstruction.Config(), data).steps == steps


def scattered(within, between, checkpoints=6, datasets=5):
    """Collections in which token t scatters by `within[t]` around centres `between` apart."""
    random, mask = np.random.default_rng(0), LAYOUT.mask().numpy()
    centres = between * random.standard_normal((datasets, 1, *SHAPE))
    noise = np.array(within)[:, None] * random.standard_normal((datasets, checkpoints, *SHAPE))
    return list(((centres + noise) * mask).astype(np.float32))


class TestImportance:
    @settings(max_examples=20)
    @given(st.lists(st.floats(0, 10), min_size=LAYOUT.tokens, max_size=LAYOUT.tokens))
    def test_weights_have_a_mean_of_one_over_the_values(self, within):
        collections = scattered(within, 1.0)
        weights = importance(LAYOUT, collections)
        assert weights.shape == (LAYOUT.tokens, 1)
        assert weights.gt(0).all()
        whole = (weights * LAYOUT.mask()).sum() / LAYOUT.values
        assert whole.item() == pytest.approx(1.0, rel=1e-5)

    def test_where_the_checkpoints_of_a_dataset_scatter_an_error_counts_less(self):
        within = np.linspace(0.0, 3.0, LAYOUT.tokens)
        collections = scattered(within, 1.0, checkpoints=200, datasets=50)
        weights = importance(LAYOUT, collections)[:, 0]
        assert (weights.diff() < 0).all()
        assert torch.allclose(weights / weights[0], torch.tensor(1 / (1 + within**2)).float(), 0.4)

    def test_every_dataset_weighs_the_same(self):
        collections = scattered(np.ones(LAYOUT.tokens), 1.0)
        repeated = [np.repeat(collections[0], 3, axis=0), *collections[1:]]
        one, other = (importance(LAYOUT, found) for found in (collections, repeated))
        assert torch.allclose(one, other, atol=1e-6)

    @pytest.mark.parametrize("datasets", [1, 3])
    def test_adapters_that_are_all_alike_count_alike(self, datasets):
        collections = [np.ones((2, *SHAPE), np.float32) * LAYOUT.mask().numpy()] * datasets
        weights = importance(LAYOUT, collections)
        assert torch.allclose(weights, torch.ones(LAYOUT.tokens, 1))


BATCH, TOKENS, DIM = 3, 7, 5
MSE, L1 = 0.7, 0.2


@pytest.fixture
def pieces():
    torch.manual_seed(0)
    normalization = Normalization(torch.randn(TOKENS, DIM), torch.rand(TOKENS, 1) + 0.5)
    weights = torch.rand(TOKENS, DIM)
    weights[2, 3:] = 0  # padding
    target, predicted = (torch.randn(BATCH, TOKENS, DIM) for _ in range(2))
    return predicted.requires_grad_(), target, normalization, weights / weights.sum()


def plainly(predicted, target, normalization, weights):
    error = predicted.float() - normalization.normalize(target)
    mse = (error.square() * weights).sum() / BATCH
    l1 = (error.abs() * weights).sum() / BATCH
    return MSE * mse + L1 * l1, mse, l1


@pytest.mark.parametrize("chunk", [1, 2 * BATCH * DIM, 10**6])
def test_it_is_the_weighted_mean_and_its_gradient(monkeypatch, pieces, chunk):
    monkeypatch.setattr(module, "CHUNK_ON_CPU", chunk)
    found, wanted = WeightedError.apply(*pieces, MSE, L1, 0.0), plainly(*pieces)
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    (ours,) = torch.autograd.grad(3 * found[0], pieces[0])
    (theirs,) = torch.autograd.grad(3 * wanted[0], pieces[0])
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert not ours[:, 2, 3:].any()


def test_half_precision_is_compared_in_full(pieces):
    predicted = pieces[0].detach().bfloat16().requires_grad_()
    loss = WeightedError.apply(predicted, *pieces[1:], MSE, L1, 0.0)[0]
    assert torch.allclose(loss, plainly(predicted, *pieces[1:])[0], atol=1e-6)
    loss.backward()
    assert predicted.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("scale", [2.0**15, 2.0**16])
def test_a_gradient_in_float16_survives_until_the_loss_is_scaled(pieces, scale):
    """Divided by 1e6 it is below float16's range, and 2^16 is above it."""
    predicted = pieces[0].detach().half().requires_grad_()
    tiny = (*pieces[1:3], pieces[3] / 1e6)
    (found,) = torch.autograd.grad(
        scale * WeightedError.apply(predicted, *tiny, MSE, L1, 0.0)[0], predicted
    )
    plain = pieces[0].detach().half().float().requires_grad_()
    (wanted,) = torch.autograd.grad(
        scale * WeightedError.apply(plain, *tiny, MSE, L1, 0.0)[0], plain
    )
    assert wanted.abs().max() > 1e-4
    assert torch.allclose(found.float(), wanted, rtol=2e-3, atol=1e-7)


def test_without_a_gradient_it_is_the_same(pieces):
    with torch.no_grad():
        loss = WeightedError.apply(*pieces, MSE, L1, 0.0)[0]
    assert not loss.requires_grad
    assert torch.allclose(loss, plainly(*pieces)[0], atol=1e-6)


def test_noise_is_on_the_target(pieces):
    quiet, noisy = (WeightedError.apply(*pieces, MSE, L1, noise)[1] for noise in (0.0, 10.0))
    assert noisy > 10 * quiet
