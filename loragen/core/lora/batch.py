"""Examples -> the tensors of one forward pass, with nothing computed twice.

Rows of a dataset begin alike: the chat template, the system text, the instruction. *Packing* lays
that shared prefix down once and lets every row's remainder follow it in one sequence, under a mask
by which a token sees the prefix and its own row only, at the positions it would have alone. Every
token sees exactly the context of its row: loss and gradients are those of a padded batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from typing import NamedTuple

import torch
from torch import Tensor

from loragen.core.data.tokenize import Example, shared_prefix

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
