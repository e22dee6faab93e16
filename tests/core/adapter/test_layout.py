import hashlib
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loragen.core.adapter.layout import PACKING_VERSION, Layout
from loragen.core.errors import DataError, UsageError

MODULES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj", "mlp.up_proj")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SPECIAL = (float("nan"), float("inf"), float("-inf"), -0.0, 5e-324, 1e-45, 6e-8)
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def key(layer, module, matrix):
    return f"base_model.model.model.layers.{layer}.{module}.{matrix}.weight"


def filled(shape, dtype, seed):
    """Random bits, and the values that arithmetic would not keep."""
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    flat = tensor.view(-1)
    for index, value in zip(range(0, flat.numel(), 3), SPECIAL, strict=False):
        flat[index] = value
    return tensor


def bits(tensor):
    return tensor.contiguous().view(INTEGERS[tensor.itemsize])


@st.composite
def adapters(draw, dtypes=DTYPES):
    """Any modules, shapes and ranks, in any mixture of types; layers need not be alike."""
    adapter, seed = {}, 0
    for layer in range(draw(st.integers(1, 12))):
        for module in draw(st.lists(st.sampled_from(MODULES), min_size=1, unique=True)):
            rank, wide, tall = (draw(st.integers(1, 9)) for _ in range(3))
            for matrix, shape in (("lora_A", (rank, wide)), ("lora_B", (tall, rank))):
                seed += 1
                adapter[key(layer, module, matrix)] = filled(
                    shape, draw(st.sampled_from(dtypes)), seed
                )
    if draw(st.booleans()):
        adapter["base_model.model.embed_tokens.lora_embedding_A"] = filled((2, 5), dtypes[0], 98)
        adapter["base_model.model.embed_tokens.lora_embedding_B"] = filled((7, 2), dtypes[0], 99)
    names = draw(st.permutations(sorted(adapter)))
    return {name: adapter[name] for name in names}


token_dims = st.integers(1, 40)


@settings(max_examples=60)
@given(st.sampled_from(DTYPES).flatmap(lambda dtype: adapters((dtype,))), token_dims)
def test_packing_is_exact_bit_for_bit(adapter, token_dim):
    layout = Layout.of(adapter, token_dim)
    tokens = layout.pack(adapter)
    again = layout.unpack(tokens)
    assert again.keys() == adapter.keys()
    for name, tensor in adapter.items():
        assert again[name].dtype == tensor.dtype
        assert again[name].is_contiguous()
        assert bits(again[name]).equal(bits(tensor)), name


@settings(max_examples=40)
@given(adapters(), token_dims)
def test_mixed_dtypes_are_restored(adapter, token_dim):
    layout = Layout.of(adapter, token_dim)
    again = layout.unpack(layout.pack(adapter))
    for name, tensor in adapter.items():
        assert again[name].dtype == tensor.dtype
        same = (again[name] == tensor) & (again[name].signbit() == tensor.signbit())
        assert (same | (again[name].isnan() & tensor.isnan())).all(), name


@settings(max_examples=40)
@given(adapters((torch.float32,)), token_dims, st.integers(1, 3))
def test_several_adapters_unpack_as_each_alone(adapter, token_dim, several):
    layout = Layout.of(adapter, token_dim)
    tokens = torch.randn(several, layout.tokens, token_dim, requires_grad=True)
    together = layout.unpack_several(tokens)
    assert together.keys() == adapter.keys()
    for index, one in enumerate(tokens.detach()):
        for name, tensor in layout.unpack(one).items():
            assert together[name][index].equal(tensor), name
    sum(tensor.square().sum() for tensor in together.values()).backward()
    mask = layout.mask().expand_as(tokens)
    assert tokens.grad.equal(torch.where(mask, 2 * tokens.detach(), 0.0))


@settings(max_examples=40)
@given(adapters(), token_dims)
def test_the_mask_is_true_on_values_and_the_rest_is_zero(adapter, token_dim):
    layout = Layout.of(adapter, token_dim)
    mask, tokens = layout.mask(), layout.pack({k: torch.ones_like(t) for k, t in adapter.items()})
    assert mask.shape == tokens.shape == (layout.tokens, token_dim)
    assert mask.sum() == layout.values == sum(t.numel() for t in adapter.values())
    assert tokens[mask].eq(1).all()
    assert tokens[~mask].eq(0).all()


@settings(max_examples=40)
@given(adapters(), token_dims)
def test_the_grid_has_the_origin_of_each_token(adapter, token_dim):
    layout = Layout.of(adapter, token_dim)
    grid = layout.grid()
    assert (grid.tokens, grid.token_dim) == (layout.tokens, token_dim)
    owners = layout.owners()
    for codes in (grid.layer, grid.module, grid.matrix, grid.position):
        assert codes.shape == (grid.tokens,)
        assert codes.dtype == np.int64
        assert sorted(set(codes.tolist())) == list(range(codes.max() + 1))  # without gaps
    origins = set(zip(*(c.tolist() for c in (grid.layer, grid.module, grid.matrix)), strict=True))
    assert len(origins) == len(layout.tensors)
    for index, spec in enumerate(layout.tensors):
        mine = owners == index
        assert mine.sum() == -(-spec.size // token_dim)
        assert grid.position[mine].tolist() == list(range(mine.sum()))
        for code in (grid.layer, grid.module, grid.matrix):
            assert len(set(code[mine].tolist())) == 1


@settings(max_examples=30)
@given(adapters(), token_dims)
def test_the_state_restores_the_layout(adapter, token_dim):
    layout = Layout.of(adapter, token_dim)
    assert Layout.from_state(json.loads(json.dumps(layout.state()))) == layout


@settings(max_examples=30)
@given(adapters(), token_dims, st.randoms())
def test_the_order_of_the_tensors_does_not_matter(adapter, token_dim, random):
    names = list(adapter)
    random.shuffle(names)
    assert Layout.of({name: adapter[name] for name in names}, token_dim) == Layout.of(
        adapter, token_dim
    )


def test_a_token_is_a_piece_of_one_rank_component():
    """lora_A row by row, lora_B column by column."""
    adapter = {
        key(0, "q", "lora_A"): torch.arange(6.0).view(2, 3),
        key(0, "q", "lora_B"): torch.arange(8.0).view(4, 2),
    }
    tokens = Layout.of(adapter, 4).pack(adapter)
    assert tokens.tolist() == [[0, 1, 2, 3], [4, 5, 0, 0], [0, 2, 4, 6], [1, 3, 5, 7]]


def test_another_way_of_packing_has_another_version():
    """Caches hold packed adapters: if this fails, raise PACKING_VERSION."""
    adapter = {
        key(layer, module, matrix): torch.arange(6.0).view(*shape) + layer
        for layer in (0, 1)
        for module in ("q", "v")
        for matrix, shape in (("lora_A", (2, 3)), ("lora_B", (3, 2)))
    }
    packed = Layout.of(adapter, 2).pack(adapter).numpy().tobytes()
    found = hashlib.sha256(packed).hexdigest()[:16]
    assert (PACKING_VERSION, found) == (1, "c792e4bdd5d9a47f")


def test_layers_are_in_numeric_order():
    adapter = {key(layer, "q", "lora_A"): torch.full((1, 2), layer) * 1.0 for layer in (10, 2, 1)}
    layout = Layout.of(adapter, 2)
    assert layout.pack(adapter).tolist() == [[1, 1], [2, 2], [10, 10]]
    assert layout.grid().layer.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "dtypes, packed",
    [
        ((torch.float16, torch.float16), torch.float16),
        ((torch.float16, torch.bfloat16), torch.float32),
        ((torch.bfloat16, torch.float64), torch.float64),
    ],
)
def test_the_grid_is_in_the_narrowest_type_that_holds_every_tensor(dtypes, packed):
    adapter = {f"x{i}.lora_A.weight": torch.ones(1, 2, dtype=t) for i, t in enumerate(dtypes)}
    layout = Layout.of(adapter, 2)
    assert layout.dtype == layout.pack(adapter).dtype == packed


def test_too_few_tokens_is_an_error_that_names_the_size_needed():
    adapter = {key(0, "q", "lora_A"): torch.zeros(5, 10)}
    with pytest.raises(UsageError, match=r"layout\.max_seq_len .*13 tokens"):
        Layout.of(adapter, 4, max_tokens=12)
    assert Layout.of(adapter, 4, max_tokens=13).tokens == 13


def test_integers_are_refused():
    with pytest.raises(DataError, match=r"q\.lora_A\.weight: torch\.int8"):
        Layout.of({key(0, "q", "lora_A"): torch.zeros(2, 2, dtype=torch.int8)}, 4)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"x.lora_A.weight": torch.zeros(3, 2)}, r"x\..*\[3, 2\], expected \[2, 3\]"),
        ({"y.lora_A.weight": torch.zeros(2, 3)}, "unexpected: y"),
    ],
)
def test_another_adapter_is_refused(change, reason):
    adapter = {"x.lora_A.weight": torch.zeros(2, 3)}
    layout = Layout.of(adapter, 4)
    with pytest.raises(DataError, match=reason):
        layout.pack({**adapter, **change})
    with pytest.raises(DataError, match="missing: x"):
        layout.pack({})
    with pytest.raises(DataError, match=r"\[1, 4\], expected \[2, 4\]"):
        layout.unpack(torch.zeros(1, 4))


@pytest.fixture(scope="session")
def qwen_adapter(shared):
    """A rank-8 all-linear adapter of Qwen2.5-0.5B, without its values."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from loragen.core.adapter.files import adapter_state

    config = AutoConfig.from_pretrained(shared / "models" / "qwen2.5-0.5b-config")
    with torch.device("meta"):
        lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_config(config), lora)
    return adapter_state(model)


def test_the_size_of_a_real_adapter(qwen_adapter):
    layout = Layout.of(qwen_adapter, token_dim=384)
    assert len(layout.tensors) == 24 * 7 * 2
    assert layout.values == 4_399_104
    assert layout.tokens == sum(-(-spec.size // 384) for spec in layout.tensors)
    assert 0 <= layout.tokens * 384 - layout.values < 384 * len(layout.tensors)
    grid = layout.grid()
    assert [int(codes.max()) + 1 for codes in (grid.layer, grid.module, grid.matrix)] == [24, 7, 2]


def test_the_original_sequence_length_cannot_hold_a_real_adapter(qwen_adapter):
    with pytest.raises(UsageError, match=r"layout\.max_seq_len is 512"):
        Layout.of(qwen_adapter, 384, max_tokens=512)
