import pytest
import torch
import torch.nn.functional as F

from loragen.core.adapter.files import attach_adapter, read_adapter
from loragen.core.base.load import load_base
from loragen.core.data.rows import read_rows
from loragen.core.data.tokenize import Example, tokenize_row
from loragen.core.lora.evaluate import generate
from loragen.core.lora.packing import (
    IGNORED,
    Cost,
    answer_logits,
    answer_losses,
    packed,
    padded,
    rows_right,
)

EXAMPLES = [
    Example([5, 6, 7, 8, 9, 10, 11], 3),
    Example([20, 21, 22], 1),
    Example([30, 31, 32, 33, 34], 4),
    Example([40, 41], 1),
]


@pytest.fixture
def batch():
    return padded(EXAMPLES, pad_id=0)


@torch.inference_mode()
def full_losses(model, batch):
    """As everybody computes it: all logits, shifted by one, under the mask."""
    logits = model(input_ids=batch.ids, attention_mask=attention(batch)).logits
    losses = F.cross_entropy(logits.transpose(1, 2).double(), batch.targets, reduction="none")
    return losses[batch.targets != IGNORED]


def attention(batch):
    return (batch.segments >= 0).long()


def test_it_is_the_cross_entropy_of_the_full_logits_under_the_mask(base, batch):
    losses = answer_losses(base.model, batch)
    assert losses.shape == (9,)
    assert (losses - full_losses(base.model, batch)).abs().max() < 1e-6


def test_what_the_model_does_to_its_logits_is_kept(base, batch):
    """Gemma's soft cap, Granite's scale: applied after the output layer."""
    head = base.model.get_output_embeddings()
    head.register_forward_hook(lambda _, __, logits: torch.tanh(logits * 3))
    assert (answer_losses(base.model, batch) - full_losses(base.model, batch)).abs().max() < 1e-6


def test_the_gradient_is_that_of_the_full_logits(base_dir, batch):
    model = load_base(str(base_dir), torch.float64).model
    weight = model.model.layers[0].self_attn.q_proj.weight.requires_grad_()
    (ours,) = torch.autograd.grad(answer_losses(model, batch).sum(), weight)
    labels = torch.full_like(batch.ids, IGNORED)
    labels[:, 1:] = batch.targets[:, :-1]
    # transformers' own mean over the answer tokens
    loss = model(input_ids=batch.ids, attention_mask=attention(batch), labels=labels).loss
    (theirs,) = torch.autograd.grad(loss, weight)
    assert (ours / 9 - theirs).abs().max() < 1e-7


def test_padding_and_the_rows_beside_change_nothing(base, batch):
    together = answer_losses(base.model, batch)
    alone = torch.cat([answer_losses(base.model, padded([item], 0)) for item in EXAMPLES])
    assert (together - alone).abs().max() < 1e-6


def test_the_logits_are_of_answer_tokens_only_and_the_model_is_left_as_it_was(base, batch):
    logits, tokens = answer_logits(base.model, batch)
    assert logits.shape == (9, base.model.config.vocab_size)
    assert tokens.tolist() == [9, 10, 11, 22, 31, 32, 33, 34, 41]
    whole = base.model(input_ids=batch.ids, attention_mask=attention(batch)).logits
    assert whole.shape[:2] == batch.ids.shape


def test_the_hook_is_gone_after_an_error(base, batch):
    broken = batch._replace(ids=batch.ids + 100_000)
    with pytest.raises(IndexError):
        answer_losses(base.model, broken)
    assert base.model(input_ids=batch.ids).logits.shape[1] == batch.ids.shape[1]


def test_half_precision_is_widened_before_the_softmax(base_dir, batch):
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
            one = padded([item], 0)
            assert rows_right(answer_logits(base.model, one)[0], one).tolist() == [right]
        batch = packed(examples, 0, Cost(1.0, pair)) if together else padded(examples, 0)
        right = rows_right(answer_logits(base.model, batch)[0], batch)
        assert right.shape == (10,)
        assert int(right.sum()) == 5
        if not together:  # packing changes the order of rows
            assert right.tolist() == wanted


@torch.inference_mode()
def test_it_is_the_exact_match_of_lora_eval(train_lora, base, dataset):
    """On rows of which a trained adapter gets some right, end token and all."""
    file = dataset()
    settings = {"training.max_steps": 30, "schedule.stage1_steps": 30, "checkpoints.first_step": 30}
    with torch.inference_mode(False):
        run = train_lora(settings, file=file)
    model = attach_adapter(base.model, read_adapter(run.directory / "adapter"), "adapter")
    rows = read_rows(file)
    written = generate(model, base.tokenizer, rows, 4)
    exact = [text.strip() == row.response for text, row in zip(written, rows, strict=True)]
    assert 0 < sum(exact) < len(rows)
    examples = [tokenize_row(base.tokenizer, row, 100).example for row in rows]
    batch = padded(examples, 0)
    assert rows_right(answer_logits(model, batch)[0], batch).tolist() == exact
    batch = packed(examples, 0, Cost(1.0, 1.0))
    assert int(rows_right(answer_logits(model, batch)[0], batch).sum()) == sum(exact)
