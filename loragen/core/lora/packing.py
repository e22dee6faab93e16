"""Examples -> the tensors of one forward pass, with nothing computed twice.

Rows of a dataset begin alike: the chat template, the system text, the instruction. *Packing* lays
that shared prefix down once and lets every row's remainder follow it in one sequence, under a mask
by which a token sees the prefix and its own row only, at the positions it would have alone. Every
token sees exactly the context of its row: loss and gradients are those of a padded batch.

The language-model loss on answer tokens, with the vocabulary projection at those only.

Whether a base model may be fed packed batches: asked of the model itself, not of a table.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from loragen.core.data.tokenize import Example, shared_prefix

log = logging.getLogger(__name__)

IGNORED = -100  # the target that cross_entropy leaves out
PREFIX, PADDING = 0, -1  # segments that are no row
PATIENCE = 4  # divisions in a row that cost more, before no better one is expected


class Batch(NamedTuple):
    """Sequences of tokens; all tensors are int64 ``[sequences, length]``."""

    ids: Tensor
    positions: Tensor
    """Each token's place in its own row, from 0."""
    segments: Tensor
    """0 for a prefix that the sequence's rows share, 1, 2, ... for the rows, -1 for padding."""
    targets: Tensor
    """The answer token that a position has to predict; -100 where it has none."""
    step_answers: int
    """Answer tokens of the whole optimizer step, over all devices and accumulation rounds."""
    packed: bool

    def to(self, device: torch.device) -> "Batch":
        ids, positions, segments, targets = (tensor.to(device) for tensor in self[:4])
        return Batch(ids, positions, segments, targets, self.step_answers, self.packed)


@dataclass(frozen=True)
class Cost:
    """What a model's forward pass costs, in floating-point operations of one layer."""

    token: float
    """Of one token in the linear layers."""
    pair: float
    """Of one (query, key) pair in the attention."""

    def of(self, sequences: int, length: int) -> float:
        return sequences * length * (self.token + length * self.pair)


def padded(examples: Sequence[Example], pad_id: int, step_answers: int | None = None) -> Batch:
    """One row a sequence, padded on the right; `step_answers` defaults to what is in here."""
    rows = [[(1, 0, item)] for item in examples]
    return _laid_out(rows, 0, pad_id, step_answers or answers_of(examples), packed=False)


def packed(
    examples: Sequence[Example], pad_id: int, cost: Cost, step_answers: int | None = None
) -> Batch:
    """The shared prefix once, then the rows' remainders; in as many sequences as cost least.

    One sequence computes the prefix once, but its attention grows with the square of its length.
    """
    shared, bins = division(examples, cost)
    rows = [[(n, shared, examples[i]) for n, i in enumerate(one, start=1)] for one in bins]
    return _laid_out(rows, shared, pad_id, step_answers or answers_of(examples), packed=True)


def division(examples: Sequence[Example], cost: Cost) -> tuple[int, list[list[int]]]:
    """The length of the shared prefix, and which examples go into which sequence after it."""
    shared = common_tokens(examples)
    return shared, cheapest_bins([len(item.ids) - shared for item in examples], shared, cost)


def cheapest_bins(remainders: Sequence[int], shared: int, cost: Cost) -> list[list[int]]:
    """Which rows go into which sequence. More sequences mean more copies of the prefix and less
    attention, so the cost first falls and then rises."""
    best, least, worse = [list(range(len(remainders)))], float("inf"), 0
    for count in range(1, len(remainders) + 1):
        bins = balanced(remainders, count)
        price = cost.of(count, shared + max(sum(remainders[i] for i in one) for one in bins))
        if price < least:
            best, least, worse = bins, price, 0
        elif (worse := worse + 1) == PATIENCE:
            break
    return best


def common_tokens(examples: Sequence[Example]) -> int:
    """How many first tokens all rows share; at least the last token of a prompt stays with its
    row, since it predicts the row's answer."""
    return shared_prefix([item.ids[: len(item.ids) - item.answer - 1] for item in examples])


def balanced(lengths: Sequence[int], bins: int) -> list[list[int]]:
    """The indices of `lengths` in `bins` groups of nearly equal sums: the longest first, each to
    the emptiest group."""
    groups: list[list[int]] = [[] for _ in range(bins)]
    sums = [(0, group) for group in range(bins)]
    heapify(sums)
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        total, emptiest = sums[0]
        groups[emptiest].append(index)
        heapreplace(sums, (total + lengths[index], emptiest))
    return groups


def block_mask(segments: Tensor) -> Tensor:
    """``[sequences, 1, queries, keys]``, True where a query may look: back, at the shared prefix
    and at its own row. (Padding looks at padding, as a query that sees nothing gives NaN.)"""
    query, key = segments[:, :, None], segments[:, None, :]
    length = segments.shape[1]
    back = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    return (back & ((key == PREFIX) | (key == query)))[:, None]


def answers_of(examples: Sequence[Example]) -> int:
    return sum(item.answer for item in examples)


def _laid_out(
    sequences: Sequence[Sequence[tuple[int, int, Example]]],
    shared: int,
    pad_id: int,
    step_answers: int,
    packed: bool,
) -> Batch:
    """Sequences of (segment, first token to take, example), after `shared` prefix tokens."""
    length = shared + max(sum(len(e.ids) - first for _, first, e in one) for one in sequences)
    ids = torch.full((len(sequences), length), pad_id)
    positions = torch.zeros_like(ids)
    segments = torch.full_like(ids, PADDING)
    targets = torch.full_like(ids, IGNORED)
    for row, sequence in enumerate(sequences):
        ids[row, :shared] = torch.tensor(sequence[0][2].ids[:shared], dtype=ids.dtype)
        positions[row, :shared] = torch.arange(shared)
        segments[row, :shared] = PREFIX
        end = shared
        for segment, first, item in sequence:
            start, end = end, end + len(item.ids) - first
            ids[row, start:end] = torch.tensor(item.ids[first:])
            positions[row, start:end] = torch.arange(first, len(item.ids))
            segments[row, start:end] = segment
            targets[row, end - item.answer - 1 : end - 1] = ids[row, end - item.answer : end]
    return Batch(ids, positions, segments, targets, step_answers, packed)


def answer_logits(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits ``[answers, vocabulary]`` of every answer token, and the tokens ``[answers]``, in the
    order in which the batch holds them.

    The hidden states are narrowed on their way into the output layer, so whatever the model does
    to its logits after that (soft caps, scales) is kept. With a large vocabulary this is most of
    the work saved: an answer has 3 or 4 tokens, a row more than 100.
    """
    predicts = batch.targets != IGNORED  # (S, T)

    def narrow(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = inputs[0]  # (S, T, H)
        return (hidden[predicts].unsqueeze(0), *inputs[1:])  # (1, answers, H)

    handle = model.get_output_embeddings().register_forward_pre_hook(narrow)
    try:
        output = model(input_ids=batch.ids, use_cache=False, **_context(model, batch))
    finally:
        handle.remove()
    return output.logits.squeeze(0), batch.targets[predicts]


def answer_losses(model: Any, batch: Batch) -> Tensor:
    """Cross entropy (nats) of every answer token, ``[answers]``, in float32 or better."""
    logits, tokens = answer_logits(model, batch)
    return token_losses(logits, tokens)


def token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    wide = logits if logits.itemsize >= 4 else logits.float()
    return F.cross_entropy(wide, tokens, reduction="none")


def rows_right(logits: Tensor, batch: Batch) -> Tensor:
    """Whether each row's answer is what the model would write greedily, ``[rows]`` bool.

    With the true answer so far as context, the likeliest next token is right at every place
    exactly when greedy decoding gives that answer.
    """
    predicts = batch.targets != IGNORED
    sequence = torch.arange(len(batch.segments), device=batch.segments.device)[:, None]
    owner = (sequence * (batch.segments.max() + 1) + batch.segments)[predicts]  # (answers,)
    _, row = torch.unique(owner, return_inverse=True)
    hits = logits.argmax(-1) == batch.targets[predicts]
    right = torch.ones(int(row.max()) + 1, dtype=torch.bool, device=hits.device)
    return right.index_put((row[~hits],), torch.zeros_like(row[~hits], dtype=torch.bool))


def _context(model: Any, batch: Batch) -> dict[str, Tensor]:
    """What each token sees: with one row a sequence, a plain padding mask says it."""
    if not batch.packed:
        return {"attention_mask": (batch.segments != PADDING).long()}
    mask = block_mask(batch.segments)
    if model.config._attn_implementation != "sdpa":  # the others add the mask to the scores
        dtype = model.get_input_embeddings().weight.dtype
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
            ~mask, torch.finfo(dtype).min
        )
    return {"attention_mask": mask, "position_ids": batch.positions}


# Mean difference (nats) of the answer tokens' losses that rounding may make. Measured: 4e-7 in
# float32 and 2e-3 in bfloat16 where packing is right, 5e-2 and more where it is not. (Norms
# compute in float32 whatever the model is in.)
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
ROUGH = 2e-2  # 16-bit arithmetic


def packing_cost(model: Any, examples: Sequence[Example], pad_id: int, rows: int) -> Cost | None:
    """What a packed batch of this model costs, or None where it cannot be packed.

    It can where the model takes a 4-D mask and restarted positions: the longest `rows` rows, as
    many as it is to train on at once, have to give the losses that they have alone. A model that
    does not costs one notice and trains on padded batches, slower and just as right.
    """
    cost = model_cost(model)
    reason = _objection(model, examples, pad_id, cost, rows)
    if reason is None:
        return cost
    log.info("rows are padded, not packed: this base model %s", reason)
    return None


def model_cost(model: Any) -> Cost:
    """Floating-point operations of one layer's forward pass, from its sizes."""
    config = model.config.get_text_config()
    embeddings = {id(p) for m in _embeddings(model) for p in m.parameters()}
    inner = sum(p.numel() for p in model.parameters() if id(p) not in embeddings)
    return Cost(token=2 * inner / config.num_hidden_layers, pair=4 * config.hidden_size)


@torch.no_grad()
def _objection(
    model: Any, examples: Sequence[Example], pad_id: int, cost: Cost, rows: int
) -> str | None:
    longest = sorted(examples, key=lambda item: -len(item.ids))[:rows]
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    if window and len(longest[0].ids) > window:
        return f"has a sliding window of {window} tokens, and a row has {len(longest[0].ids)}"
    trial = longest if len(longest) > 1 else longest * 2  # one row alone sees no other
    in_order = [trial[index] for one in division(trial, cost)[1] for index in one]
    modes = {module: module.training for module in model.modules()}  # a base keeps its eval mode
    model.eval()
    try:
        alone = answer_losses(model, padded(in_order, pad_id).to(model.device))
        together = _losses_together(model, packed(trial, pad_id, cost).to(model.device))
    finally:
        for module, mode in modes.items():
            module.training = mode
    if isinstance(together, Exception):
        return f"refuses a 4-D attention mask ({type(together).__name__})"
    # nan, too, is no equality
    if not (alone - together).abs().mean() <= TOLERANCE.get(model.dtype, ROUGH):
        return "gives other losses under a 4-D attention mask"
    return None


def _losses_together(model: Any, batch: Batch) -> torch.Tensor | Exception:
    try:
        return answer_losses(model, batch)
    except Exception as error:  # noqa: BLE001  # a stranger's forward may raise anything
        return error


def _embeddings(model: Any) -> list[Any]:
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    return [module for module in both if module is not None]
