import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from loragen.core.adapter.layout import Layout
from loragen.core.errors import UsageError
from loragen.core.generator.network import (
    Network,
    Normalization,
    condition_scale,
    new_network,
    summarize_decoder,
)

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


def test_a_frozen_matrix_of_any_values_has_the_scale_one():
    """Three equal float32 matrices have no deviation, although a third of them is rounded."""
    tokens = collection(3, 3)
    frozen = torch.from_numpy(LAYOUT.owners() == 1)
    tokens[:, frozen] = tokens[0, frozen]
    fitted = Normalization.fit(LAYOUT, [tokens, tokens])
    assert fitted.scale[frozen].eq(1.0).all()
    assert fitted.scale[~frozen].ne(1.0).any()
    assert fitted.mean[frozen].equal(torch.from_numpy(tokens[0])[frozen])


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


class Echo(nn.Module):
    """Returns its condition."""

    def forward(self, condition, mask):
        return condition


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
    network.condition_mean, network.condition_spread = condition_scale(datasets)
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
    network.condition_mean, network.condition_spread = condition_scale(
        [(np.ones((4, 1, 2), np.float32), np.ones((4, 1), dtype=bool))]
    )
    condition = torch.ones(1, 4, 1, 2)
    assert network(condition, torch.ones(1, 4, 1, dtype=torch.bool)).eq(0).all()


def test_the_scale_is_kept_with_the_weights():
    one, other = Network(Echo(), 5), Network(Echo(), 5)
    one.condition_mean, one.condition_spread = condition_scale([embedded(9, 1, offset=3.0)])
    other.load_state_dict(one.state_dict())
    assert other.condition_mean.equal(one.condition_mean)
    assert other.condition_spread.equal(one.condition_spread)


def test_options_that_do_not_fit_the_layout_are_a_usage_error():
    shapes = {"shapes": [(1, 1, 2), (1, 1, 2)]}
    with pytest.raises(UsageError, match=r"decoder hyperconv: the last map \[1, 1, 2\] has 2"):
        new_network("hyperconv", shapes, 5, LAYOUT)


CONDITION = (4, 2, 6)


@pytest.fixture
def layout():
    """Two layers of one module: 4 cells of 3 tokens."""
    shapes = {"lora_A": (2, 12), "lora_B": (12, 2)}
    return Layout.of(
        {
            f"base_model.model.layers.{layer}.q_proj.{matrix}.weight": torch.empty(shape)
            for layer in range(2)
            for matrix, shape in shapes.items()
        },
        token_dim=8,
    )


@pytest.mark.parametrize(
    ("options", "names", "shapes"),
    [
        (
            {"blocks": 2, "hidden_dim": 10, "rank": 3},
            ["read", "expand", "blocks.0", "blocks.1", "steer", "project"],
            [(20,), (2, 2, 10), (2, 2, 10), (2, 2, 10), (2, 2, 3), (12, 8)],
        ),
        (
            {"shapes": [(3, 2, 4), (6, 3, 4), (12, 2, 4)]},
            ["fit", "blocks.0", "blocks.1"],
            [(3, 2, 4), (6, 3, 4), (12, 2, 4)],
        ),
    ],
)
def test_a_summary_is_that_of_the_decoder(layout, options, names, shapes):
    found = summarize_decoder("hyperconv", options, layout, CONDITION)
    assert [stage.name for stage in found.stages] == names
    assert [stage.shape for stage in found.stages] == shapes
    real = new_network("hyperconv", options, CONDITION[-1], layout)
    assert found.parameters == sum(p.numel() for p in real.parameters())
    assert sum(stage.parameters for stage in found.stages) == found.parameters
    assert found.weights_bytes == 4 * found.parameters
    assert found.training_bytes == 4 * found.parameters + 12 * found.trained
    assert found.pair_bytes == 4 * sum(torch.Size(shape).numel() for shape in shapes)


def test_frozen_parameters_are_not_trained(layout):
    found = summarize_decoder(
        "hyperconv", {"rank": 3, "train_directions": False}, layout, CONDITION
    )
    assert found.parameters - found.trained == 12 * 3 * 8
    assert "train_directions: false" in found.choices[-1]


def test_a_mixture_has_a_coefficient_for_every_dataset(layout):
    found = summarize_decoder("mixture", {"hidden_dim": 10}, layout, CONDITION, datasets=700)
    assert [stage.name for stage in found.stages] == ["read", "ridge", "combine"]
    assert [stage.shape for stage in found.stages] == [(10,), (1, 700), (12, 8)]
    assert found.trained == found.parameters  # the adapters are none of them
    assert found.choices[0] == "700 coefficients, one for each dataset"


def test_chosen_sizes_are_described(layout):
    found = summarize_decoder("hyperconv", {"max_parameters": 12 * 8 * 5}, layout, CONDITION)
    assert "2 layers x 2 kinds of matrix x 384 channels" in found.choices[0]
    assert "5 directions of 96 values" in found.choices[1]
    assert "max_parameters 480" in found.choices[1]
    configured = summarize_decoder("hyperconv", {"rank": 3}, layout, CONDITION)
    assert "3 directions of 96 values" in configured.choices[1]


def test_maps_that_are_too_small_are_a_usage_error(layout):
    with pytest.raises(UsageError, match="decoder hyperconv: the last map"):
        summarize_decoder("hyperconv", {"shapes": [(3, 2, 4), (5, 2, 4)]}, layout, CONDITION)


def test_nothing_is_allocated_whatever_the_size():
    shape = (64, 1_000_000)
    large = Layout.of({"m.layers.0.q.lora_A.weight": torch.empty(shape, device="meta")}, 384)
    summary = summarize_decoder("hyperconv", {"rank": 100, "blocks": 1}, large, CONDITION)
    assert summary.parameters > 6_400_000_000
    assert torch.get_default_device() == torch.device("cpu")


def test_the_random_state_is_left_alone(layout):
    before = torch.get_rng_state()
    summarize_decoder("hyperconv", {"rank": 3}, layout, CONDITION)
    assert torch.get_rng_state().equal(before)
