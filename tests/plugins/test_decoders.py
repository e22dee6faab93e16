import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loragen.core.generator.layout import Layout
from loragen.core.plugins import create, find
from loragen.core.protocols import TokenGrid
from loragen.plugins.decoders.hyperconv import AxisConv, token_places
from loragen.testing import check_decoder, grid

SMALL = {"blocks": 1, "hidden_dim": 12, "rank": 4}


def decoder(grid, dim=6, **options):
    return create("decoder", "hyperconv", {**SMALL, **options}, dim, grid)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def uneven():
    """Layer 1 has more tokens than layer 0, and their tokens are interleaved."""
    layer = np.array([0, 1, 1, 0, 1, 1, 2])
    zeros = np.zeros(7, dtype=np.int64)
    return TokenGrid(7, 5, layer, zeros, zeros, np.arange(7))


@pytest.mark.parametrize(
    "options",
    [
        SMALL,
        {**SMALL, "blocks": 0},
        {**SMALL, "blocks": 3, "kernel_size": 7},
        {**SMALL, "kernel_size": 1},
        {**SMALL, "max_parameters": 100},  # shared expander
        {**SMALL, "hidden_dim": 8},  # as wide as a token
        {"hidden_dim": 16},
    ],
)
def test_contract(options):
    check_decoder(find("decoder", "hyperconv"), **options)


def test_the_expander_is_full_where_it_fits():
    shape = grid(layers=3)
    rank, width = SMALL["rank"], SMALL["hidden_dim"]
    expander = decoder(shape).expand
    full = rank * shape.tokens * width
    assert expander.maps.numel() == full
    assert decoder(shape, max_parameters=full).expand.maps.numel() == full
    assert decoder(shape, max_parameters=full - 1).expand.maps.numel() < full


@pytest.mark.parametrize("allowed", [500, 1000, 2000, 5000])
def test_the_shared_expander_takes_the_largest_rank_that_fits(allowed):
    layers, length = 12, 12
    module = decoder(grid(layers=layers), rank=400, max_parameters=allowed).expand
    rank = module.scales.shape[0]
    each = (layers + length) * SMALL["hidden_dim"]
    assert module.maps.numel() + module.scales.numel() == rank * each
    assert rank == max(1, allowed // each)


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("layers", [1, 4])
def test_a_block_costs_the_same_whatever_the_number_of_tokens(kernel, layers):
    """2 · hidden² + 2 · kernel · hidden, and biases and the norm: 6 · hidden."""
    width = SMALL["hidden_dim"]
    module = decoder(grid(layers=layers), blocks=2, kernel_size=kernel)
    for block in module.blocks:
        assert count(block) == 2 * width**2 + 2 * kernel * width + 6 * width


def test_layers_may_differ_in_length():
    shape = uneven()
    places, length = token_places(shape)
    assert length == 4
    assert places.tolist() == [0, 4, 5, 1, 6, 7, 8]
    output = decoder(shape)(torch.randn(2, 3, 1, 6), torch.ones(2, 3, 1, dtype=torch.bool))
    assert output.shape == (2, 7, 5)


@settings(max_examples=50)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_every_token_has_a_place_of_its_own_in_its_layer(layers):
    codes = np.unique(layers, return_inverse=True)[1].astype(np.int64)
    zeros = np.zeros(len(layers), dtype=np.int64)
    places, length = token_places(TokenGrid(len(layers), 2, codes, zeros, zeros, zeros))
    assert len(set(places.tolist())) == len(layers)
    assert (places // length).tolist() == codes.tolist()
    for layer in set(codes.tolist()):
        assert (np.diff(places[codes == layer]) > 0).all()


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("size", [1, 2, 3, 9])
@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_an_axis_is_convolved_as_torch_does_it(axis, size, kernel):
    torch.manual_seed(0)
    width = 4
    shape = [2, 3, 3, width]
    shape[axis] = size
    x, conv = torch.randn(shape), AxisConv(width, kernel, axis)
    torch.nn.init.normal_(conv.bias)
    wanted = torch.nn.functional.conv1d(
        x.movedim(axis, 2).reshape(-1, size, width).transpose(1, 2),
        conv.weight.T.unsqueeze(1),
        conv.bias,
        padding=kernel // 2,
        groups=width,
    )  # (rest, W, size)
    found = conv(x).movedim(axis, 2).reshape(-1, size, width).transpose(1, 2)
    assert torch.allclose(found, wanted, atol=1e-5)


def test_the_number_and_the_order_of_prompts_do_not_matter():
    module = decoder(grid()).eval()
    condition = torch.randn(1, 5, 1, 6)
    mask = torch.ones(1, 5, 1, dtype=torch.bool)
    output = module(condition, mask)
    assert torch.allclose(module(condition.flip(1), mask), output, atol=1e-5)
    twice = module(condition.repeat(1, 2, 1, 1), mask.repeat(1, 2, 1))
    assert torch.allclose(twice, output, atol=1e-5)


def test_equal_seeds_build_equal_decoders():
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(decoder(grid()).state_dict())
    assert all(states[0][key].equal(states[1][key]) for key in states[0])


def test_a_real_adapter_is_decoded_within_the_budget():
    """Qwen2.5-0.5B, rank 8, all linear layers: 24 layers, 4.4 M values."""
    hidden, key_value, wide = 896, 128, 4864
    sizes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, key_value),
        "self_attn.v_proj": (hidden, key_value),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (hidden, wide),
        "mlp.up_proj": (hidden, wide),
        "mlp.down_proj": (wide, hidden),
    }
    adapter = {}
    for layer in range(24):
        for module, (into, out) in sizes.items():
            stem = f"base_model.model.model.layers.{layer}.{module}"
            adapter[f"{stem}.lora_A.weight"] = torch.empty(8, into, device="meta")
            adapter[f"{stem}.lora_B.weight"] = torch.empty(out, 8, device="meta")
    layout = Layout.of(adapter, token_dim=384)
    assert layout.values == 4_399_104
    module = create("decoder", "hyperconv", {}, 384, layout.grid()).eval()
    assert count(module.expand) <= 40_000_000 + 1_000_000  # and its condensing layer
    started = time.perf_counter()
    with torch.inference_mode():
        output = module(torch.randn(1, 16, 1, 384), torch.ones(1, 16, 1, dtype=torch.bool))
    assert output.shape == (1, layout.tokens, 384)
    assert output.isfinite().all()
    assert time.perf_counter() - started < 60
