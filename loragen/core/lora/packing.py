"""The layout of a batch, the loss of its answers, and the check whether a model can be packed.

Rows of a dataset begin alike: the chat template, the system prompt, the instruction. A *packed*
batch holds that shared prefix once, followed by the remainders of several rows in one sequence. An
attention mask lets a token see the prefix and its own row only, and every token has the position
that it has in its row alone. Every token thus sees exactly the context of its row, and without
dropout loss and gradients are those of a padded batch.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from heapq import heapify, heapreplace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from loragen.core.data.tokenize import Example, shared_prefix

log = logging.getLogger(__name__)

IGNORED = -100
"""The label that cross_entropy leaves out."""
PREFIX, PADDING = 0, -1
"""The segments of tokens that are in no row."""


class Batch(NamedTuple):
    """Sequences of tokens. All tensors are int64 ``[sequences, length]``, in comments (S, T)."""

    ids: Tensor
    positions: Tensor
    """The position of each token in its own row, from 0."""
    segments: Tensor
    """0 for the shared prefix of a sequence, 1, 2, ... for its rows, -1 for padding."""
    shifted_labels: Tensor
    """The answer token that each position predicts, the next one; -100 if it has no loss."""
    step_label_tokens: int
    """The number of label tokens of the whole optimizer step, over all processes and rounds."""
    packed: bool

    def to(self, device: torch.device) -> "Batch":
        ids, positions, segments, shifted_labels = (tensor.to(device) for tensor in self[:4])
        return Batch(ids, positions, segments, shifted_labels, self.step_label_tokens, self.packed)


# ---------------------------------------------------------------------------- layout


@dataclass(frozen=True)
class Cost:
    """The cost of a model's forward pass, in floating-point operations of one layer."""

    token: float
    """The cost of one token in the linear layers."""
    pair: float
    """The cost of one (query, key) pair in the attention."""

    def of(self, sequences: int, length: int) -> float:
        return sequences * length * (self.token + length * self.pair)


def collate(
    examples: Sequence[Example],
    pad_id: int,
    cost: Cost | None = None,
    step_label_tokens: int | None = None,
    groups: int = 1,
    multiple: int = 1,
) -> Batch:
    """Returns a batch of rows: packed if the model has a `cost` of packed batches, else one row per
    sequence, padded on the right.

    Packed sequences hold the shared prefix and the remainders of several rows, in as many sequences
    as cost least. `step_label_tokens` defaults to the label tokens of `examples`. The rows may be
    those of several adapters, in as many `groups` of equally many rows: each has equally many
    sequences of its own, in the order of the groups. The length of the sequences is a `multiple`.
    """
    shared, bins = 0, [[index] for index in range(len(examples))]
    if cost:
        shared, bins = cheapest_packing(examples, cost, groups)
    length = shared + max(sum(len(examples[i].ids) - shared for i in one) for one in bins)
    length += -length % multiple
    ids = torch.full((len(bins), length), pad_id)
    positions = torch.zeros_like(ids)
    segments = torch.full_like(ids, PADDING)
    shifted_labels = torch.full_like(ids, IGNORED)
    for sequence, indices in enumerate(bins):
        ids[sequence, :shared] = torch.tensor(examples[indices[0]].ids[:shared], dtype=ids.dtype)
        positions[sequence, :shared] = torch.arange(shared)
        segments[sequence, :shared] = PREFIX
        end = shared
        for segment, index in enumerate(indices, start=1):
            tokens, num_labels = examples[index]
            start, end = end, end + len(tokens) - shared
            ids[sequence, start:end] = torch.tensor(tokens[shared:])
            positions[sequence, start:end] = torch.arange(shared, len(tokens))
            segments[sequence, start:end] = segment
            labels = ids[sequence, end - num_labels : end]
            shifted_labels[sequence, end - num_labels - 1 : end - 1] = labels
    if step_label_tokens is None:
        step_label_tokens = sum(item.num_label_tokens for item in examples)
    packed = cost is not None
    return Batch(ids, positions, segments, shifted_labels, step_label_tokens, packed)


def cheapest_packing(
    examples: Sequence[Example], cost: Cost, groups: int = 1
) -> tuple[int, list[list[int]]]:
    """Returns the length of the prefix that all rows share, and the indices of the rows of each
    sequence. The last token of a prompt is not shared, because it predicts the row's own answer."""
    shared = shared_prefix([ids[: len(ids) - num_labels - 1] for ids, num_labels in examples])
    remainders = [len(item.ids) - shared for item in examples]
    return shared, cheapest_bins(remainders, shared, cost, groups)


def cheapest_bins(
    remainders: Sequence[int], shared: int, cost: Cost, groups: int = 1
) -> list[list[int]]:
    """Returns the indices of the rows of each sequence, given the lengths of their remainders.

    More sequences mean more copies of the prefix and less attention, so the cost first falls and
    then rises: the search ends after four numbers of sequences that cost more than the best. No
    sequence has rows of two of the `groups`, each of which has as many sequences as the others.
    """
    best, least, worse = [list(range(len(remainders)))], float("inf"), 0
    size = len(remainders) // groups
    starts = range(0, len(remainders), size)
    for count in range(1, size + 1):
        bins = [
            [start + index for index in one]
            for start in starts
            for one in balanced_bins(remainders[start : start + size], count)
        ]
        length = shared + max(sum(remainders[i] for i in one) for one in bins)
        price = cost.of(len(bins), length)
        if price < least:
            best, least, worse = bins, price, 0
        elif (worse := worse + 1) == 4:
            break
    return best


def balanced_bins(lengths: Sequence[int], bins: int) -> list[list[int]]:
    """Returns the indices of `lengths` in `bins` groups of nearly equal sums: the longest first,
    each into the group with the smallest sum."""
    groups: list[list[int]] = [[] for _ in range(bins)]
    sums = [(0, group) for group in range(bins)]
    heapify(sums)
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        total, smallest = sums[0]
        groups[smallest].append(index)
        heapreplace(sums, (total + lengths[index], smallest))
    return groups


# ---------------------------------------------------------------------------- loss


def answer_logits(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Returns the logits ``[answers, vocabulary]`` at the positions that predict an answer token,
    and those tokens ``[answers]``, in the order of the batch.

    A hook narrows the input of the output layer, so that whatever the model does to its logits
    afterwards (soft caps, scales) is kept. With a large vocabulary this saves most of the work: an
    answer has 3 or 4 tokens, a row more than 100.
    """
    predicts = batch.shifted_labels != IGNORED  # (S, T)

    def narrow(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = inputs[0]  # (S, T, H)
        return (hidden[predicts].unsqueeze(0), *inputs[1:])  # (1, answers, H)

    if not batch.packed:  # one row per sequence: a padding mask is enough
        context = {"attention_mask": (batch.segments != PADDING).long()}
    else:
        mask = block_mask(batch.segments)  # (S, 1, T, T)
        if model.config._attn_implementation != "sdpa":  # the others add the mask to the scores
            dtype = model.get_input_embeddings().weight.dtype
            mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
                ~mask, torch.finfo(dtype).min
            )
        context = {"attention_mask": mask, "position_ids": batch.positions}
    handle = model.get_output_embeddings().register_forward_pre_hook(narrow)
    try:
        output = model(input_ids=batch.ids, use_cache=False, **context)
    finally:
        handle.remove()
    return output.logits.squeeze(0), batch.shifted_labels[predicts]


def block_mask(segments: Tensor) -> Tensor:
    """Returns ``[sequences, 1, queries, keys]`` bool: True if the query attends to the key, which
    is not after it and is in the shared prefix or in its own row.

    Padding attends to padding, because a query without any key would give NaN.
    """
    query, key = segments[:, :, None], segments[:, None, :]
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    return (causal & ((key == PREFIX) | (key == query)))[:, None]


def token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Returns the cross entropy (nats) of each token, computed in float32 or better."""
    wide = logits if logits.itemsize >= 4 else logits.float()
    return F.cross_entropy(wide, tokens, reduction="none")


def answer_losses(model: Any, batch: Batch) -> Tensor:
    """Returns the cross entropy (nats) of every answer token, ``[answers]``."""
    logits, tokens = answer_logits(model, batch)
    return token_losses(logits, tokens)


def rows_right(logits: Tensor, batch: Batch) -> Tensor:
    """Returns ``[rows]`` bool: whether greedy decoding gives a row's answer.

    It does if and only if the most likely token is right at every answer position, given the true
    answer before it.
    """
    predicts = batch.shifted_labels != IGNORED
    sequence = torch.arange(len(batch.segments), device=batch.segments.device)[:, None]
    owner = (sequence * (batch.segments.max() + 1) + batch.segments)[predicts]  # (answers,)
    _, row = torch.unique(owner, return_inverse=True)
    hits = logits.argmax(-1) == batch.shifted_labels[predicts]
    right = torch.ones(int(row.max()) + 1, dtype=torch.bool, device=hits.device)
    return right.index_put((row[~hits],), torch.zeros_like(row[~hits], dtype=torch.bool))


# ---------------------------------------------------------------------------- packing check


TOLERANCE = 1e-4
"""The mean difference (nats) of the answer tokens' losses in float32 that rounding may cause.
Measured on real models: 5e-6 at most; on models that cannot be packed: 5e-2 and more."""


def packing_cost(model: Any, examples: Sequence[Example], pad_id: int, rows: int) -> Cost | None:
    """Returns the cost of this model's packed batches, or None if it cannot be packed.

    Packing needs a model that accepts a 4-D mask and restarted positions. The check is an
    experiment: the longest `rows` rows, as many as a micro-batch has, must have the losses that
    they have alone, computed in float32 whatever the model's dtype is: in bfloat16 rounding alone
    changes the losses of a real model as much as a wrong mask. A model that fails trains on padded
    batches, which are slower, and is logged.
    """
    cost = model_cost(model)
    obstacle = _packing_obstacle(model, examples, pad_id, cost, rows)
    if obstacle is None:
        return cost
    log.info("rows are padded, not packed: this base model %s", obstacle)
    return None


def model_cost(model: Any) -> Cost:
    """Returns the cost of one layer's forward pass, from the model's sizes.

    An operation of the attention, in narrow matrices, counts three times: on the CPU it takes 1.5
    (float32) to 4 (bfloat16) times as long as one of the linear layers, measured on SmolLM2-135M.
    """
    config = model.config.get_text_config()
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    embeddings = {id(p) for module in ends if module is not None for p in module.parameters()}
    inner = sum(p.numel() for p in model.parameters() if id(p) not in embeddings)
    return Cost(token=2 * inner / config.num_hidden_layers, pair=3 * 4 * config.hidden_size)


@torch.no_grad()
def _packing_obstacle(
    model: Any, examples: Sequence[Example], pad_id: int, cost: Cost, rows: int
) -> str | None:
    """Returns why a model cannot be packed, as the end of a sentence about it."""
    longest = sorted(examples, key=lambda item: -len(item.ids))[:rows]
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    if window and len(longest[0].ids) > window:
        return f"has a sliding window of {window} tokens, and a row has {len(longest[0].ids)}"
    trial = longest if len(longest) > 1 else longest * 2  # a single row has no other to see
    if len(cheapest_packing(trial, cost)[1]) == len(trial):  # shorter rows may still share one
        trial, cost = trial[:2], Cost(token=1.0, pair=0.0)
    in_order = [trial[index] for one in cheapest_packing(trial, cost)[1] for index in one]
    modes = {module: module.training for module in model.modules()}  # the base is in eval mode
    model.eval()
    try:
        with in_float32(model):
            try:
                alone = answer_losses(model, collate(in_order, pad_id).to(model.device))
            except Exception as error:
                if model.dtype.itemsize >= 4:  # what fails on padded rows is not about packing
                    raise
                return f"does not compute in float32 ({type(error).__name__})"
            try:
                together = answer_losses(model, collate(trial, pad_id, cost).to(model.device))
            except Exception as error:  # noqa: BLE001  # the forward of a model may raise anything
                return f"does not accept a 4-D attention mask ({type(error).__name__})"
    finally:
        for module, mode in modes.items():
            module.training = mode
    difference = float((alone - together).abs().mean())
    if not difference <= TOLERANCE:  # NaN is a difference, too
        return f"has other losses under a 4-D attention mask, by {difference:.1g} nats on average"
    return None


@contextmanager
def in_float32(model: Any) -> Iterator[None]:
    """Within this context a model in 16 bits, or quantised to 4 or 8, computes in float32.

    Only the layer that computes at the moment has its weights in float32, so that a base of 7
    billion parameters needs no second copy. Weights of 32 bits or more are left as they are.
    """
    from peft.utils.integrations import dequantize_module_weight

    narrow: dict[Tensor, Tensor] = {}

    def widen(tensors: Sequence[Tensor], *_: Any) -> None:
        for tensor in tensors:
            if tensor.is_floating_point() and tensor.itemsize == 2 and tensor not in narrow:
                narrow[tensor], tensor.data = tensor.data, tensor.data.float()

    def restore(tensors: Sequence[Tensor], *_: Any) -> None:
        for tensor in tensors:
            if tensor in narrow:
                tensor.data = narrow.pop(tensor)

    def dequantized(module: Any, inputs: Tensor) -> Tensor:
        weight, bias = dequantize_module_weight(module).float(), module.bias
        return F.linear(inputs.float(), weight, None if bias is None else bias.float())

    with ExitStack() as stack:
        for module, is_layer in _layers(model):
            tensors = [*module.parameters(is_layer), *module.buffers(is_layer)]
            before, after = partial(widen, tensors), partial(restore, tensors)
            stack.enter_context(module.register_forward_pre_hook(before))
            stack.enter_context(module.register_forward_hook(after, always_call=True))
        for module in model.modules():
            # Not getattr, which on a layer with LoRA gives the weight of the layer inside.
            if type(module._parameters.get("weight")).__name__ in ("Params4bit", "Int8Params"):
                own = {k: v for k, v in vars(module).items() if k == "forward"}  # of accelerate
                module.forward = partial(dequantized, module)
                stack.callback(vars(module).update, own)
                stack.callback(vars(module).pop, "forward")  # called before the update
        yield


def _layers(module: Any) -> Iterator[tuple[Any, bool]]:
    """Yields the layers of a model and True; and the modules outside of them and False."""
    if isinstance(module, torch.nn.ModuleList):
        yield from ((layer, True) for layer in module)
        return
    yield module, False
    for child in module.children():
        yield from _layers(child)
