import pytest
import torch

from loragen.core.generator.network import Normalization
from loragen.core.learning.objectives import reconstruction as module
from loragen.core.learning.objectives.reconstruction import weighted_error

BATCH, TOKENS, DIM = 3, 7, 5
SHARES = {"mse_weight": 0.7, "l1_weight": 0.2}


@pytest.fixture
def pieces():
    torch.manual_seed(0)
    normalization = Normalization(torch.randn(TOKENS, DIM), torch.rand(TOKENS, 1) + 0.5)
    weights = torch.rand(TOKENS, DIM)
    weights[2, 3:] = 0  # padding
    target, written = (torch.randn(BATCH, TOKENS, DIM) for _ in range(2))
    return written.requires_grad_(), target, normalization, weights / weights.sum()


def plainly(written, target, normalization, weights):
    error = written.float() - normalization.normalize(target)
    mse = (error.square() * weights).sum() / BATCH
    l1 = (error.abs() * weights).sum() / BATCH
    return SHARES["mse_weight"] * mse + SHARES["l1_weight"] * l1, mse, l1


@pytest.mark.parametrize("chunk", [1, 2 * BATCH * DIM, 10**6])
def test_it_is_the_weighted_mean_and_its_gradient(monkeypatch, pieces, chunk):
    monkeypatch.setattr(module, "CHUNK_ON_CPU", chunk)
    found, wanted = weighted_error(*pieces, **SHARES), plainly(*pieces)
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    (ours,) = torch.autograd.grad(3 * found[0], pieces[0])
    (theirs,) = torch.autograd.grad(3 * wanted[0], pieces[0])
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert not ours[:, 2, 3:].any()


def test_half_precision_is_compared_in_full(pieces):
    written = pieces[0].detach().bfloat16().requires_grad_()
    loss = weighted_error(written, *pieces[1:], **SHARES)[0]
    assert torch.allclose(loss, plainly(written, *pieces[1:])[0], atol=1e-6)
    loss.backward()
    assert written.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("scale", [2.0**15, 2.0**16])
def test_a_gradient_in_float16_survives_until_the_loss_is_scaled(pieces, scale):
    """Divided by 1e6 it is below float16's range, and 2^16 is above it."""
    written = pieces[0].detach().half().requires_grad_()
    tiny = (*pieces[1:3], pieces[3] / 1e6)
    (found,) = torch.autograd.grad(scale * weighted_error(written, *tiny, **SHARES)[0], written)
    plain = pieces[0].detach().half().float().requires_grad_()
    (wanted,) = torch.autograd.grad(scale * weighted_error(plain, *tiny, **SHARES)[0], plain)
    assert wanted.abs().max() > 1e-4
    assert torch.allclose(found.float(), wanted, rtol=2e-3, atol=1e-7)


def test_without_a_gradient_it_is_the_same(pieces):
    with torch.no_grad():
        loss = weighted_error(*pieces, **SHARES)[0]
    assert not loss.requires_grad
    assert torch.allclose(loss, plainly(*pieces)[0], atol=1e-6)


def test_noise_is_on_the_target(pieces):
    quiet, noisy = (weighted_error(*pieces, **SHARES, noise=noise)[1] for noise in (0.0, 10.0))
    assert noisy > 10 * quiet
