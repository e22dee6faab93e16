import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loragen.core.adapter.layout import Layout
from loragen.core.generator.network import Normalization

ADAPTER = {
    "m.layers.0.q.lora_A.weight": torch.zeros(2, 5),
    "m.layers.0.q.lora_B.weight": torch.zeros(3, 2),
    "m.layers.1.q.lora_A.weight": torch.zeros(2, 7),
}
LAYOUT = Layout.of(ADAPTER, token_dim=4)


def collection(count, seed, scales=(1.0, 100.0, 1e-4), offset=0.0):
    """`count` random adapters, whose three tensors are of unlike size, packed."""
    generator = torch.Generator().manual_seed(seed)
    packed = []
    for _ in range(count):
        tensors = {
            key: torch.randn(t.shape, generator=generator) * scale + offset * scale
            for (key, t), scale in zip(ADAPTER.items(), scales, strict=True)
        }
        packed.append(LAYOUT.pack(tensors).numpy())
    return np.stack(packed)


@settings(max_examples=30)
@given(st.integers(1, 6), st.integers(0, 1000), st.floats(0, 50))
def test_denormalising_undoes_it_to_rounding(count, seed, offset):
    tokens = collection(count, seed, offset=offset)
    fitted = Normalization.fit(LAYOUT, [tokens])
    given_tokens = torch.from_numpy(tokens)
    again = fitted.denormalize(fitted.normalize(given_tokens))
    size = torch.maximum(given_tokens.abs(), fitted.mean.abs())
    assert ((again - given_tokens).abs() <= 4 * torch.finfo(torch.float32).eps * size).all()


def test_every_tensor_has_unit_deviation_and_no_mean():
    tokens = collection(50, 0, offset=3.0)
    fitted = Normalization.fit(LAYOUT, [tokens])
    normal = fitted.normalize(torch.from_numpy(tokens))
    assert normal.mean(0).abs().max() < 1e-4
    mask, owners = LAYOUT.mask(), torch.from_numpy(LAYOUT.owners())
    for tensor in range(3):
        values = normal[:, owners == tensor][:, mask[owners == tensor]]
        assert values.square().mean().sqrt() == pytest.approx(1.0, abs=1e-4)


def test_padding_stays_zero():
    fitted = Normalization.fit(LAYOUT, [collection(5, 1, offset=2.0)])
    padding = ~LAYOUT.mask()
    assert fitted.mean[padding].eq(0).all()
    assert fitted.normalize(torch.from_numpy(collection(1, 2)))[0][padding].eq(0).all()


@pytest.mark.parametrize("value", [0.0, 1e-12, 0.1, 1e6])
def test_a_tensor_that_never_changes_keeps_its_values(value):
    tokens = collection(4, 3)
    still = torch.from_numpy(LAYOUT.owners() == 1)
    tokens[:, still] = np.float32(value) * LAYOUT.mask()[still].float().numpy()
    fitted = Normalization.fit(LAYOUT, [tokens])
    assert fitted.scale[still].eq(1.0).all()
    assert fitted.scale.isfinite().all()
    assert fitted.normalize(torch.from_numpy(tokens))[:, still].abs().max() <= value * 1e-6
    zeros = torch.zeros(LAYOUT.tokens, LAYOUT.token_dim)
    assert torch.allclose(fitted.denormalize(zeros)[still], torch.from_numpy(tokens[0])[still])


def test_one_checkpoint_alone_is_its_own_mean():
    tokens = collection(1, 4)
    fitted = Normalization.fit(LAYOUT, [tokens])
    assert fitted.scale.eq(1.0).all()
    assert fitted.normalize(torch.from_numpy(tokens)).eq(0).all()


def test_each_dataset_weighs_the_same_whatever_its_number_of_checkpoints():
    one, other = collection(1, 5), collection(9, 6)
    fitted = Normalization.fit(LAYOUT, [one, other])
    mean = (one.mean(0, dtype=np.float64) + other.mean(0, dtype=np.float64)) / 2
    assert np.allclose(fitted.mean.numpy(), mean, rtol=1e-6, atol=1e-9)
    repeated = Normalization.fit(LAYOUT, [np.repeat(one, 3, axis=0), other])
    assert torch.allclose(repeated.mean, fitted.mean)
    assert torch.allclose(repeated.scale, fitted.scale)


def test_the_scale_is_the_deviation_from_the_mean_of_the_datasets():
    collections = [collection(4, 7), collection(2, 8, offset=1.0)]
    fitted = Normalization.fit(LAYOUT, collections)
    mean = sum(c.mean(0, dtype=np.float64) for c in collections) / 2
    for tensor, spec in enumerate(LAYOUT.tensors):
        mine = LAYOUT.owners() == tensor
        squares = [np.square(c[:, mine] - mean[mine]).sum((1, 2)).mean() for c in collections]
        wanted = np.sqrt(sum(squares) / 2 / spec.size)
        assert fitted.scale[mine].numpy() == pytest.approx(wanted, rel=1e-5)
