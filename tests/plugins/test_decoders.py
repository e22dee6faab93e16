import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loragen.core.adapter.layout import Layout
from loragen.core.plugins import create, find
from loragen.core.protocols import TokenGrid
from loragen.plugins.decoders.feature_maps import round_robin
from loragen.plugins.decoders.hyperconv import AxisConv, cells_of, principal_directions
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
        {**SMALL, "rank": "auto", "max_parameters": 100},
        {**SMALL, "train_directions": False},
        {"hidden_dim": 16},
    ],
)
def test_contract(options):
    check_decoder(find("decoder", "hyperconv"), **options)


@pytest.mark.parametrize(
    "shapes",
    [
        [(3, 2, 4), (24, 2, 4)],
        [(1, 1, 8), (5, 3, 4), (13, 4, 4)],  # more values than the 12 tokens of 8 need
        [(50, 3, 2), (96, 1, 2)],  # more slots than prompts
    ],
)
def test_the_papers_geometry_keeps_the_contract(shapes):
    check_decoder(find("decoder", "hyperconv"), shapes=shapes)


def test_the_papers_geometry_computes_in_float64_too():
    shape = grid()
    module = create("decoder", "hyperconv", {"shapes": [(3, 2, 4), (24, 2, 4)]}, 6, shape).double()
    mask = torch.ones(2, 5, 2, dtype=torch.bool)
    assert module(torch.randn(2, 5, 2, 6).double(), mask).dtype == torch.float64


def test_options_of_the_other_geometry_are_refused():
    with pytest.raises(ValueError, match="dropout and shapes"):
        find("decoder", "hyperconv").Config(shapes=[(3, 2, 4), (24, 2, 4)], dropout=0.1)


def test_a_last_map_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match="has 95 values, the adapter needs 24 tokens x 8 = 192"):
        create("decoder", "hyperconv", {"shapes": [(3, 2, 4), (19, 1, 5)]}, 6, grid())


@pytest.mark.parametrize(("allowed", "directions"), [(96, 4), (24 * 8 * 7, 7), (10**9, 32)])
def test_as_many_directions_as_the_budget_allows(allowed, directions):
    shape = grid()
    module = create("decoder", "hyperconv", {"max_parameters": allowed}, 6, shape).body
    assert module.project.directions.shape == (shape.tokens, directions, shape.token_dim)


@pytest.mark.parametrize("items", [1, 3, 4, 7])
def test_prompts_are_distributed_evenly(items):
    """Any number of them to four slots, and masked ones to none."""
    mask = torch.tensor([[True] * items + [False] * 2])
    weights = round_robin(mask, 4)[0]
    assert weights.shape == (4, items + 2)
    assert torch.allclose(weights.sum(1), torch.ones(4))
    assert not weights[:, items:].any()
    count_of = (weights > 0).sum(0)[:items]
    assert count_of.min() >= 1
    assert count_of.max() - count_of.min() <= 1


def assert_each_part_matters(module, output):
    """Randomising any trained parameter changes the output."""
    before = output()
    for name, parameter in module.named_parameters():
        assert parameter.requires_grad, name
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.copy_(torch.randn_like(parameter))
        assert not output().allclose(before, atol=1e-4), name
        with torch.no_grad():
            parameter.copy_(kept)


class Held:
    def __init__(self, values):
        self.values, self.shape = values, tuple(values.shape)

    def __getitem__(self, tokens):
        return self.values[:, tokens]


@pytest.mark.parametrize(("samples", "most"), [(6, 3), (3, 8)])
def test_it_starts_from_the_principal_components(samples, most):
    torch.manual_seed(0)
    values = torch.randn(samples, 24, 8)
    values -= values.mean(0)
    found = principal_directions(Held(values), most)
    _, s, vt = torch.linalg.svd(values.flatten(1), full_matrices=False)
    kept = min(most, samples - 1)  # centred samples span one dimension less
    assert found.shape == (24, kept, 8)
    wanted = (s[:kept, None] * vt[:kept]).view(kept, 24, 8) / samples**0.5
    for k in range(kept):
        sign = torch.sign((found[:, k] * wanted[k]).sum())
        assert torch.allclose(found[:, k] * sign, wanted[k], atol=1e-4)


def test_what_the_samples_do_not_span_starts_small():
    torch.manual_seed(0)
    module = decoder(grid(), rank=4)
    before = module.body.project.directions.detach().clone()
    module.start_from(Held(torch.randn(1, 24, 8)))
    after = module.body.project.directions
    assert torch.allclose(after[:, 1:], 0.1 * before[:, 1:])
    assert not torch.allclose(after[:, 0], 0.1 * before[:, 0])


def test_directions_may_stay_as_they_are():
    module = decoder(grid(), train_directions=False)
    assert not module.body.project.directions.requires_grad
    assert "body.project.directions" in module.state_dict()


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("layers", [1, 4])
def test_a_block_costs_the_same_whatever_the_number_of_tokens(kernel, layers):
    """2 · hidden² + 2 · kernel · hidden, and biases and the norm: 6 · hidden."""
    width = SMALL["hidden_dim"]
    module = decoder(grid(layers=layers), blocks=2, kernel_size=kernel)
    for block in module.body.blocks:
        assert count(block) == 2 * width**2 + 2 * kernel * width + 6 * width


def test_layers_may_differ_in_length():
    shape = uneven()
    output = decoder(shape)(torch.randn(2, 3, 1, 6), torch.ones(2, 3, 1, dtype=torch.bool))
    assert output.shape == (2, 7, 5)


@settings(max_examples=50)
@given(st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=1, max_size=30))
def test_tokens_share_a_cell_when_they_share_layer_module_and_matrix(origins):
    codes = [np.unique(axis, return_inverse=True)[1] for axis in zip(*origins, strict=True)]
    layer, module, matrix = (code.astype(np.int64) for code in codes)
    shape = TokenGrid(len(origins), 2, layer, module, matrix, np.zeros(len(origins), np.int64))
    cell, (layers, kinds) = cells_of(shape)
    assert cell.max() < layers * kinds
    assert (cell // kinds).tolist() == layer.tolist()
    same = {(int(c), origin) for c, origin in zip(cell, origins, strict=True)}
    assert len(same) == len(set(cell.tolist())) == len(set(origins))


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
    assert count(module.body.project) <= 40_000_000
    assert count(module) - count(module.body.project) < 4_000_000
    started = time.perf_counter()
    with torch.inference_mode():
        output = module(torch.randn(1, 16, 1, 384), torch.ones(1, 16, 1, dtype=torch.bool))
    assert output.shape == (1, layout.tokens, 384)
    assert output.isfinite().all()
    assert time.perf_counter() - started < 60


def test_each_trained_part_matters():
    """After some steps: at first the blocks are the identity, and corrections are zero."""
    torch.manual_seed(0)
    module = decoder(grid(), blocks=2)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    condition, target = torch.randn(4, 3, 1, 6), torch.randn(4, 24, 8)
    mask = torch.ones(4, 3, 1, dtype=torch.bool)
    for _ in range(5):
        optimizer.zero_grad()
        (module(condition, mask) - target).square().mean().backward()
        optimizer.step()
    assert_each_part_matters(module, lambda: module(condition, mask))
