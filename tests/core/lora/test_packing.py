"""The layout of batches, the loss at answer positions, and which architectures can be packed."""

import logging

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given
from hypothesis import strategies as st

from loragen.core.adapter.files import attach_adapter, read_adapter
from loragen.core.base.load import load_base, load_training_base
from loragen.core.data.dataset import Dataset
from loragen.core.data.tokenize import Example, tokenize_row
from loragen.core.lora.packing import (
    IGNORED,
    PADDING,
    PREFIX,
    TOLERANCE,
    Cost,
    answer_logits,
    answer_losses,
    balanced_bins,
    block_mask,
    cheapest_bins,
    cheapest_packing,
    collate,
    in_float32,
    model_cost,
    packing_cost,
    rows_right,
)
from loragen.core.lora.train import train_adapter
from loragen.core.progress import Silent

PAD = 99
TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=8)  # few, so that prefixes are shared
COSTS = st.builds(Cost, st.floats(0.0, 100.0), st.floats(0.0, 100.0))
LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=20)


@st.composite
def examples(draw):
    """Rows of a dataset: some begin alike, some are equal."""
    prefix = draw(st.lists(st.integers(0, 3), max_size=6))
    rows = []
    for _ in range(draw(st.integers(1, 9))):
        answer = draw(TOKENS)
        rows.append(Example([*prefix, *draw(TOKENS), *answer], len(answer)))
    return rows


def rows_of(batch):
    """(ids, positions, targets) of every row, as the model meets them: a prefix, then its own."""
    found = []
    for ids, positions, segments, targets in zip(*batch[:4], strict=True):
        own = [s for s in segments.unique().tolist() if s > PREFIX] or [PREFIX]
        for segment in own:
            mine = (segments == PREFIX) | (segments == segment)
            found.append(tuple(t[mine].tolist() for t in (ids, positions, targets)))
    return sorted(found)


def wanted_of(examples):
    rows = []
    for item in examples:
        targets = [IGNORED] * len(item.ids)
        start = len(item.ids) - item.num_label_tokens
        targets[start - 1 : -1] = item.ids[start:]
        rows.append((item.ids, list(range(len(item.ids))), targets))
    return sorted(rows)


@given(examples(), COSTS)
def test_every_row_can_be_recovered_from_a_batch(rows, cost):
    for batch in (collate(rows, PAD), collate(rows, PAD, cost)):
        assert rows_of(batch) == wanted_of(rows)
        labels = sum(item.num_label_tokens for item in rows)
        assert int((batch.shifted_labels != IGNORED).sum()) == labels == batch.step_label_tokens
    assert collate(rows, PAD, cost).packed
    assert not collate(rows, PAD).packed


@given(examples(), COSTS)
def test_padding_is_at_the_end_and_has_no_loss(rows, cost):
    for batch in (collate(rows, PAD), collate(rows, PAD, cost)):
        padding = batch.segments == PADDING
        assert (batch.ids[padding] == PAD).all()
        assert (batch.shifted_labels[padding] == IGNORED).all()
        ends = (~padding).sum(1)
        assert int(ends.max()) == padding.shape[1]  # some sequence needs the whole length
        for row, end in zip(padding, ends.tolist(), strict=True):
            assert not row[:end].any()


@given(examples(), COSTS)
def test_a_token_attends_to_its_own_row_and_the_prefix_only(rows, cost):
    """All of its row so far, at the same positions; and nothing of another row."""
    batch = collate(rows, PAD, cost)
    mask = block_mask(batch.segments)
    count, length = batch.ids.shape
    assert mask.shape == (count, 1, length, length)
    assert mask.dtype == torch.bool
    assert mask.any(-1).all()  # a query that sees nothing gives NaN
    for sequence in range(count):
        for query in range(length):
            seen = mask[sequence, 0, query]
            segment = int(batch.segments[sequence, query])
            if segment == PADDING:
                continue
            assert set(batch.segments[sequence, seen].tolist()) <= {PREFIX, segment}
            position = int(batch.positions[sequence, query])
            assert batch.positions[sequence, seen].tolist() == list(range(position + 1))


@given(examples(), st.integers(1, 4), COSTS, st.sampled_from([1, 8]))
def test_every_group_has_its_rows_in_equally_many_sequences(rows, copies, cost, multiple):
    """In the order of the groups, which here have the same rows with other answers."""
    groups = [[Example([*ids, i], num + 1) for ids, num in rows] for i in range(copies)]
    together = [row for group in groups for row in group]
    for packing in (None, cost):
        batch = collate(together, PAD, packing, groups=copies, multiple=multiple)
        assert batch.ids.shape[1] % multiple == 0
        parts = zip(*(tensor.chunk(copies) for tensor in batch[:4]), strict=True)
        for part, group in zip(parts, groups, strict=True):
            assert len(part[0]) == len(batch.ids) // copies
            assert rows_of(part) == wanted_of(group)


@given(examples())
def test_the_shared_prefix_is_the_longest_without_any_last_prompt_token(rows):
    shared, _ = cheapest_packing(rows, Cost(1.0, 1.0))
    prompts = [len(item.ids) - item.num_label_tokens for item in rows]
    assert 0 <= shared < min(prompts)
    heads = {tuple(item.ids[:shared]) for item in rows}
    assert len(heads) == 1
    longer = {tuple(item.ids[: shared + 1]) for item in rows}
    assert len(longer) > 1 or shared == min(prompts) - 1


def test_equal_rows_have_segments_of_their_own():
    row = Example([1, 2, 3, 4, 5], 2)
    batch = collate([row] * 3, PAD, Cost(token=1.0, pair=0.0))
    assert batch.ids.tolist() == [[1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5]]
    assert batch.segments.tolist() == [[0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 2, 3, 4, 2, 3, 4]]
    assert batch.shifted_labels.tolist() == [[-100, -100, 4, 5, -100, 4, 5, -100, 4, 5, -100]]


def test_a_single_row():
    row = Example([1, 2, 3], 1)
    for batch in (collate([row], PAD, Cost(1.0, 1.0)), collate([row], PAD)):
        assert batch.ids.tolist() == [[1, 2, 3]]
        assert batch.shifted_labels.tolist() == [[-100, 3, -100]]


@pytest.mark.parametrize("cost", [None, Cost(1.0, 1.0)])
def test_the_label_tokens_of_the_step_may_be_given(cost):
    rows = [Example([1, 2, 3], 1), Example([1, 5, 6, 7], 2)]
    assert collate(rows, PAD, cost).step_label_tokens == 3
    assert collate(rows, PAD, cost, 12).step_label_tokens == 12


def test_a_moved_batch_is_equal():
    batch = collate([Example([1, 2, 3], 1)] * 2, PAD, Cost(1.0, 1.0), 7)
    moved = batch.to(torch.device("cpu"))
    assert (moved.step_label_tokens, moved.packed) == (7, True)
    assert all(a.equal(b) for a, b in zip(moved[:4], batch[:4], strict=True))


@given(LENGTHS, st.integers(1, 20))
def test_balanced_bins_have_every_index_once_and_nearly_equal_sums(lengths, bins):
    groups = balanced_bins(lengths, bins)
    assert len(groups) == bins
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in group) for group in groups]
    assert max(sums) - min(sums) <= max(lengths)
    assert all(groups) == (bins <= len(lengths))


@given(LENGTHS, st.integers(0, 100), COSTS)
def test_the_bins_have_every_row_once_and_cost_no_more_than_either_extreme(lengths, shared, cost):
    bins = cheapest_bins(lengths, shared, cost)
    assert sorted(i for one in bins for i in one) == list(range(len(lengths)))
    assert all(bins)

    def price(division):
        longest = max(sum(lengths[i] for i in one) for one in division)
        return cost.of(len(division), shared + longest)

    assert price(bins) <= price([list(range(len(lengths)))])
    assert bins == cheapest_bins(lengths, shared, cost)


def test_the_costs_decide_the_number_of_sequences():
    lengths = [10] * 8
    assert len(cheapest_bins(lengths, 100, Cost(token=1.0, pair=0.0))) == 1
    assert len(cheapest_bins(lengths, 0, Cost(token=0.0, pair=1.0))) == 8


# ---------------------------------------------------------------------------- loss

EXAMPLES = [
    Example([5, 6, 7, 8, 9, 10, 11], 3),
    Example([20, 21, 22], 1),
    Example([30, 31, 32, 33, 34], 4),
    Example([40, 41], 1),
]


@pytest.fixture
def batch():
    return collate(EXAMPLES, pad_id=0)


@torch.inference_mode()
def full_losses(model, batch):
    """As everybody computes it: all logits, shifted by one, under the mask."""
    logits = model(input_ids=batch.ids, attention_mask=attention(batch)).logits
    labels = batch.shifted_labels
    losses = F.cross_entropy(logits.transpose(1, 2).double(), labels, reduction="none")
    return losses[labels != IGNORED]


def attention(batch):
    return (batch.segments >= 0).long()


def test_answer_losses_are_the_cross_entropy_of_the_full_logits_under_the_mask(base, batch):
    losses = answer_losses(base.model, batch)
    assert losses.shape == (9,)
    assert (losses - full_losses(base.model, batch)).abs().max() < 1e-6


def test_operations_after_the_output_layer_are_kept(base, batch):
    """Gemma's soft cap, Granite's scale: applied after the output layer."""
    head = base.model.get_output_embeddings()
    head.register_forward_hook(lambda _, __, logits: torch.tanh(logits * 3))
    assert (answer_losses(base.model, batch) - full_losses(base.model, batch)).abs().max() < 1e-6


def test_the_gradient_is_that_of_the_full_logits(base_dir, batch):
    model = load_base(str(base_dir), torch.float64).model
    weight = model.model.layers[0].self_attn.q_proj.weight.requires_grad_()
    (ours,) = torch.autograd.grad(answer_losses(model, batch).sum(), weight)
    labels = torch.full_like(batch.ids, IGNORED)
    labels[:, 1:] = batch.shifted_labels[:, :-1]
    # transformers' own mean over the answer tokens
    loss = model(input_ids=batch.ids, attention_mask=attention(batch), labels=labels).loss
    (theirs,) = torch.autograd.grad(loss, weight)
    assert (ours / 9 - theirs).abs().max() < 1e-7


def test_padding_and_other_rows_do_not_change_a_loss(base, batch):
    together = answer_losses(base.model, batch)
    alone = torch.cat([answer_losses(base.model, collate([item], 0)) for item in EXAMPLES])
    assert (together - alone).abs().max() < 1e-6


def test_the_logits_are_of_answer_tokens_only_and_the_model_is_unchanged(base, batch):
    logits, tokens = answer_logits(base.model, batch)
    assert logits.shape == (9, base.model.config.vocab_size)
    assert tokens.tolist() == [9, 10, 11, 22, 31, 32, 33, 34, 41]
    whole = base.model(input_ids=batch.ids, attention_mask=attention(batch)).logits
    assert whole.shape[:2] == batch.ids.shape


def test_the_hook_is_removed_after_an_error(base, batch):
    broken = batch._replace(ids=batch.ids + 100_000)
    with pytest.raises(IndexError):
        answer_losses(base.model, broken)
    assert base.model(input_ids=batch.ids).logits.shape[1] == batch.ids.shape[1]


def test_the_loss_is_computed_in_float32_or_better(base_dir, batch):
    model = load_base(str(base_dir), torch.bfloat16).model
    losses = answer_losses(model, batch)
    assert losses.dtype == torch.float32
    assert answer_losses(model.double(), batch).dtype == torch.float64


def greedy(model, prompt, room):
    """What the model writes, token by token, without a cache or a mask."""
    ids = list(prompt)
    for _ in range(room):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@torch.inference_mode()
@pytest.mark.parametrize("together", [False, True], ids=["padded", "packed"])
def test_rows_are_right_where_greedy_decoding_gives_the_answer(base, together):
    """Half of the answers are what the model writes; the others differ in one token."""
    examples, wanted = [], []
    for i in range(10):
        prompt = [5, 6, 7, *range(20, 20 + i % 4), 40 + i]
        answer = greedy(base.model, prompt, 1 + i % 3)
        if i % 2:
            answer[i % len(answer)] = (answer[i % len(answer)] + 1) % 200
        examples.append(Example([*prompt, *answer], len(answer)))
        wanted.append(i % 2 == 0)
    for pair in (0.0, 1e9) if together else (0.0,):
        for item, right in zip(examples, wanted, strict=True):
            one = collate([item], 0)
            assert rows_right(answer_logits(base.model, one)[0], one).tolist() == [right]
        batch = collate(examples, 0, Cost(1.0, pair)) if together else collate(examples, 0)
        right = rows_right(answer_logits(base.model, batch)[0], batch)
        assert right.shape == (10,)
        assert int(right.sum()) == 5
        if not together:  # packing changes the order of rows
            assert right.tolist() == wanted


@torch.inference_mode()
def test_rows_right_is_the_exact_match_of_generation(train_lora, base, dataset):
    """On rows of which a trained adapter gets some right, end token and all."""
    file = dataset()
    settings = {"training.max_steps": 30, "schedule.stage1_steps": 30, "checkpoints.first_step": 30}
    with torch.inference_mode(False):
        run = train_lora(settings, file=file)
    model = attach_adapter(base.model, read_adapter(run.directory / "adapter"), "adapter")
    rows = Dataset(file).rows()
    tokenized = [tokenize_row(base.tokenizer, row, 100) for row in rows]
    exact = [greedy(model, one.prompt, len(one.answer)) == one.answer for one in tokenized]
    assert 0 < sum(exact) < len(rows)
    examples = [one.example for one in tokenized]
    batch = collate(examples, 0)
    assert rows_right(answer_logits(model, batch)[0], batch).tolist() == exact
    batch = collate(examples, 0, Cost(1.0, 1.0))
    assert int(rows_right(answer_logits(model, batch)[0], batch).sum()) == sum(exact)


# ---------------------------------------------------------------------------- packing check

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256,
    "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PACKED = {
    "qwen2": ("Qwen2", SIZES),
    "qwen3": ("Qwen3", SIZES),
    "llama": ("Llama", SIZES),
    "mistral": ("Mistral", {**SIZES, "sliding_window": 64}),
    "gpt2": ("GPT2", GPT2),
    "gemma2": ("Gemma2", {**SIZES, "sliding_window": 64, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3", {**SIZES, "sliding_window": 64, "query_pre_attn_scalar": 8}),
    "phi3": ("Phi3", SIZES),
    "opt": ("OPT", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2}),
}
PADDED = {
    "bloom": ("Bloom", {**SIZES, "n_layer": 2, "n_head": 4}),
    "mamba": ("Mamba", {**SIZES, "state_size": 4, "time_step_rank": 4}),
    "falcon-alibi": ("Falcon", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2,
                                "num_attention_heads": 4, "alibi": True}),
    "mpt": ("Mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": VOCABULARY,
                    "max_seq_len": 256, "initializer_range": 0.2}),
    "mistral": ("Mistral", {**SIZES, "sliding_window": 8}),
    "gpt-neo": ("GPTNeo", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2,
                "num_heads": 4, "max_position_embeddings": 256, "window_size": 24,
                "attention_types": [[["global", "local"], 1]], "initializer_range": 0.2,
                "bos_token_id": 1, "eos_token_id": 2}),
}  # fmt: skip
SIMILAR = [
    Example([5, 6, 7, 8, 9, 10, 11, 12, 13], 3),
    Example([5, 6, 7, 8, 20, 21], 1),
    Example([5, 6, 7, 8, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42], 4),
    Example([5, 6, 7, 8, 40, 41, 42], 2),
    Example([5, 6, 7, 8, 9, 44], 1),
]


def tiny(name, settings, attention=None, dtype=torch.float64):
    config_class = getattr(
        transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config"
    )
    model_class = getattr(
        transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    )
    config = config_class(**settings)
    if attention:
        config._attn_implementation = attention
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = model_class(config)
    return model.to(dtype).eval().requires_grad_(False)


def with_lora(model):
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(4)
        lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        return get_peft_model(model, lora, autocast_adapter_dtype=False).eval()


def gradients(model, batch):
    losses = answer_losses(model, batch)
    weights = [p for p in model.parameters() if p.requires_grad]
    flat = torch.autograd.grad(losses.sum(), weights)
    return losses.detach().sort().values, torch.cat([g.flatten() for g in flat])


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # GPT-2's weights lie the other way round
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", PACKED)
def test_losses_and_gradients_are_those_of_padded_rows(kind, attention):
    if (kind, attention) == ("gemma2", "sdpa"):
        pytest.skip("Gemma 2 has no sdpa")
    model = with_lora(tiny(*PACKED[kind], attention))
    assert isinstance(packing_cost(model, SIMILAR, 0, 5), Cost)
    wanted, gradient = gradients(model, collate(SIMILAR, 0))
    for pair in (0.0, 1e9):  # in one sequence, and in as many as there are rows
        losses, other = gradients(model, collate(SIMILAR, 0, Cost(1.0, pair)))
        assert (losses - wanted).abs().max() < 1e-5
        assert (other - gradient).norm() < 1e-5 * gradient.norm()


def differences(model, rows=SIMILAR):
    """The mean differences (nats) of packed and padded losses, as the model computes them and in
    float32."""
    cost = Cost(token=1.0, pair=0.0)  # all in one sequence
    in_order = [rows[index] for index in cheapest_packing(rows, cost)[1][0]]

    @torch.no_grad()
    def difference():
        alone, together = collate(in_order, 0), collate(rows, 0, cost)
        return float((answer_losses(model, alone) - answer_losses(model, together)).abs().mean())

    native = difference()
    with in_float32(model):
        return native, difference()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", PACKED)
def test_rounding_does_not_prevent_packing(kind, dtype):
    model = tiny(*PACKED[kind], dtype=dtype)
    assert packing_cost(model, SIMILAR, 0, 5)
    assert differences(model)[1] < TOLERANCE / 50


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", PADDED)
def test_a_model_that_cannot_be_packed_is_logged_once(kind, dtype, caplog):
    caplog.set_level(logging.INFO, "loragen")
    model = tiny(*PADDED[kind], dtype=dtype)
    assert packing_cost(model, SIMILAR, 0, 5) is None
    (message,) = [r.getMessage() for r in caplog.records if r.name.startswith("loragen")]
    assert message.startswith("rows are padded, not packed: this base model ")


SHARP = {**SIZES, "num_hidden_layers": 6, "initializer_range": 0.6}
"""A model whose losses depend on every bit, as those of a trained model of many layers do."""
LONG = [
    Example([5, 6, 7, 8, *((7 * row + 5 * i) % VOCABULARY for i in range(20 + row))], 6)
    for row in range(8)
]


class Forgetful(transformers.LlamaForCausalLM):
    """Restarted positions do not reach it: rows after the first are too far from the prefix."""

    def forward(self, *args, position_ids=None, **options):
        return super().forward(*args, **options)


class Unmasked(transformers.LlamaForCausalLM):
    """Takes a 4-D mask and does not use it: a row sees the rows before it."""

    def forward(self, *args, attention_mask=None, **options):
        return super().forward(*args, **options)


def sharp(model_class, dtype, **changes):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = model_class(transformers.LlamaConfig(**{**SHARP, **changes}))
    return model.to(dtype).eval().requires_grad_(False)


def test_bfloat16_may_change_the_losses_as_much_as_a_wrong_mask():
    """What a real model does: only float32 tells the two apart."""
    right = sharp(transformers.LlamaForCausalLM, torch.bfloat16)
    rounding, exact = differences(right, LONG)
    assert rounding > 100 * TOLERANCE
    assert exact < TOLERANCE / 4
    assert packing_cost(right, LONG, 0, 8)
    for wrong in (Forgetful, Unmasked):
        model = sharp(wrong, torch.bfloat16)
        assert differences(model, LONG)[1] > 1000 * TOLERANCE
        assert packing_cost(model, LONG, 0, 8) is None


@pytest.mark.parametrize(("wrong", "weights"), [(Forgetful, 0.04), (Unmasked, 0.01)])
def test_an_error_below_the_rounding_of_bfloat16_is_found(wrong, weights):
    """With small weights the attention is nearly even, and a wrong layout changes little."""
    rounding, _ = differences(sharp(transformers.LlamaForCausalLM, torch.bfloat16), LONG)
    model = sharp(wrong, torch.bfloat16, initializer_range=weights)
    assert TOLERANCE < differences(model, LONG)[1] < rounding / 3
    assert packing_cost(model, LONG, 0, 8) is None


def test_rows_that_training_packs_are_tried_packed_even_if_the_longest_are_not():
    """Rows of 200 tokens are cheaper alone; shorter ones would share a sequence."""
    long = [Example([5, *(i % VOCABULARY for i in range(row, row + 200))], 2) for row in range(2)]
    model = tiny(*PADDED["gpt-neo"])
    assert len(cheapest_packing(long, model_cost(model))[1]) == 2
    assert packing_cost(model, [*SIMILAR, *long], 0, 2) is None


def test_only_the_layer_that_computes_is_in_float32():
    model = with_lora(tiny(*PACKED["llama"], dtype=torch.bfloat16))
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    layers = model.base_model.model.model.layers
    seen = []
    for layer in layers:
        layer.register_forward_hook(
            lambda *_: seen.append([{p.dtype for p in one.parameters()} for one in layers])
        )
    with in_float32(model):
        losses = answer_losses(model, collate(SIMILAR, 0))
    wide, narrow = {torch.float32}, {torch.bfloat16}
    assert seen[0][0] == wide
    assert seen[0][1] == narrow
    assert seen[1] == [narrow, wide]
    assert all(weight.equal(weights[name]) for name, weight in model.state_dict().items())
    assert {p.dtype for p in model.parameters()} == narrow
    assert (losses - answer_losses(model.float(), collate(SIMILAR, 0))).abs().max() < 1e-6


def test_the_weights_are_narrow_again_after_an_error():
    model = tiny(*PACKED["llama"], dtype=torch.bfloat16)
    with pytest.raises(IndexError), in_float32(model):
        answer_losses(model, collate([Example([5, 6, VOCABULARY + 5], 1)], 0))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_base_in_4_bits_computes_in_float32():
    bits = pytest.importorskip("bitsandbytes", reason="quantised bases need bitsandbytes")
    model = tiny(*PACKED["llama"], dtype=torch.bfloat16)
    for layer in model.model.layers:
        plain = layer.mlp.up_proj
        layer.mlp.up_proj = bits.nn.Linear4bit(
            plain.in_features, plain.out_features, bias=False, quant_type="nf4",
            compute_dtype=torch.bfloat16,
        )  # fmt: skip
        layer.mlp.up_proj.load_state_dict({"weight": plain.weight})
        layer.mlp.up_proj.to("cpu")
    assert type(model.model.layers[0].mlp.up_proj.weight).__name__ == "Params4bit"
    before = answer_losses(model, collate(SIMILAR, 0))
    native, exact = differences(model)
    assert exact < 1e-6 < native
    assert packing_cost(model, SIMILAR, 0, 5)
    assert answer_losses(model, collate(SIMILAR, 0)).equal(before)


@pytest.mark.parametrize("kind", ["mamba", "bloom"])
def test_a_single_row_is_tried_twice(kind):
    """A batch larger than the dataset has it several times."""
    assert packing_cost(tiny(*PADDED[kind]), SIMILAR[:1], 0, 5) is None


def test_a_sliding_window_has_to_hold_every_row():
    name, settings = PACKED["mistral"]
    longest = max(len(item.ids) for item in SIMILAR)
    for window, fits in ((longest, True), (longest - 1, False)):
        model = tiny(name, {**settings, "sliding_window": window})
        assert (packing_cost(model, SIMILAR, 0, 5) is not None) == fits


def test_packing_may_be_tried_within_inference_mode():
    """As the first validation does; the weights can be trained through afterwards."""
    model = tiny(*PACKED["llama"], dtype=torch.bfloat16)
    with torch.inference_mode():
        assert packing_cost(model, SIMILAR, 0, 5)
    assert not any(weight.is_inference() for weight in model.parameters())
    embedded = model.get_input_embeddings()(torch.tensor([[5, 6]])).requires_grad_()
    model(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad.abs().max() > 0


def test_packing_is_tried_in_eval_mode_and_the_modes_are_restored():
    name, settings = PACKED["gpt2"]
    model = tiny(name, {**settings, "resid_pdrop": 0.5}).train()
    state = torch.get_rng_state()
    base = model.transformer.eval()  # as a loaded base is, inside an adapter that trains
    assert packing_cost(model, SIMILAR, 0, 5)
    assert model.training
    assert not any(module.training for module in base.modules())
    assert torch.get_rng_state().equal(state)


def test_an_error_with_padded_rows_is_raised(monkeypatch):
    """What fails on padded rows too is not about packing."""
    model = tiny(*PACKED["llama"])
    broken = [Example([5, 6, VOCABULARY + 5], 1)]
    with pytest.raises(IndexError):
        packing_cost(model, broken, 0, 5)


def test_the_cost_counts_the_layers_and_not_the_embeddings():
    cost = model_cost(tiny(*PACKED["llama"]))
    inner = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48  # q, o; k, v; the MLP
    assert cost.token == pytest.approx(2 * inner, rel=0.02)  # and the norms
    assert cost.pair == 3 * 4 * 32


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("kind", ["mamba", "gpt2"])
def test_training_runs_packed_or_padded(kind, tokenizer, tmp_path, lora_config, dataset, caplog):
    caplog.set_level(logging.INFO, "loragen")
    name, settings = {**PADDED, **PACKED}[kind]
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    sizes = {**settings, "vocab_size": len(tokenizer), **ids}
    tiny(name, sizes, dtype=torch.float32).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    targets = ["in_proj", "x_proj"] if kind == "mamba" else "all-linear"
    config = lora_config(
        {
            "base_model": str(tmp_path / "base"),
            "data.val_ratio": 0.25,
            "lora.target_modules": targets,
        }
    )
    run = train_adapter(config, Dataset(dataset(), "colors"), load_training_base(config), Silent())
    assert run.manifest.status == "success"
    notices = [m for m in caplog.messages if m.startswith("rows are padded, not packed")]
    assert len(notices) == (kind == "mamba")


def test_packed_and_padded_training_are_equal(lora_config, base_dir, dataset):
    from loragen.core.adapter.files import read_adapter

    adapters = []
    for packing in (True, False):
        config = lora_config({"training.packing": packing, "trainer.precision": "64-true"})
        base = load_training_base(config)
        run = train_adapter(config, Dataset(dataset(), "colors"), base, Silent())
        adapters.append(read_adapter(run.directory / "adapter").tensors)
    one, other = adapters
    assert max(float((one[key] - other[key]).abs().max()) for key in one) < 1e-4
