"""Pairs to learn from: some prompts of a dataset, with a checkpoint of that dataset.

Which pairs make up a step is a pure function of (seed, step), as for LoRA training; devices and
accumulation rounds take their parts of it.
"""

from collections.abc import Sequence
from math import ceil
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from loragen.core.data.batches import batch_indices
from loragen.core.generator.collections.prepared import PreparedSource
from loragen.core.lora.batch import Batch


class Others(NamedTuple):
    """Conditions of other datasets than those of a batch's adapters."""

    condition: Tensor
    """``[others, prompts, positions, dim]``"""
    mask: Tensor
    datasets: Tensor
    """``[others]`` int64: which they are."""


class PairBatch(NamedTuple):
    condition: Tensor
    """``[batch, prompts, positions, dim]``"""
    mask: Tensor
    """``[batch, prompts, positions]`` bool"""
    tokens: Tensor
    """``[batch, tokens, token_dim]``: adapters, not normalised."""
    rows: Batch | None = None
    """Where the behaviour is judged: equally many rows of every adapter's dataset, in order."""
    texts: list[list[str]] | None = None
    """The prompts of every condition, where the encoder trains along; `condition` is empty then."""
    others: Others | None = None
    """Where the adapters are to be written from other datasets alone."""


class PairBatches(Dataset[PairBatch]):
    """Item k is the k-th micro-batch, `parts` to an optimizer step, for one device.

    Every checkpoint comes equally often.
    """

    def __init__(
        self,
        sources: Sequence[PreparedSource],
        texts: Sequence[Sequence[int]],
        *,
        batch_size: int,
        prompts: int,
        seed: int,
        parts: int = 1,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        """`texts[i]` are the indices of source i's prompt texts that may be drawn, where its
        checkpoints have none of their own; `batch_size` counts the pairs of a micro-batch, of all
        devices."""
        self.sources, self.texts = sources, texts
        self.batch_size, self.prompts, self.seed = batch_size, prompts, seed
        self.parts, self.rank, self.ranks = parts, rank, ranks
        self.pairs = [(i, c) for i, source in enumerate(sources) for c in range(len(source.tokens))]

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps; no step is cut by the end of an epoch."""
        return ceil(len(self.pairs) / (self.batch_size * self.parts))

    def __getitem__(self, k: int) -> PairBatch:
        size = self.batch_size
        step, part = divmod(k, self.parts)
        batch = batch_indices(len(self.pairs), size * self.parts, self.seed, step)
        mine = range(part * size + self.rank, (part + 1) * size, self.ranks)
        return stacked(
            [
                self._pair(*self.pairs[batch[place]], draw=f"{self.seed}:{step}:{place}")
                for place in mine
            ]
        )

    def _pair(self, source: int, checkpoint: int, draw: str) -> PairBatch:
        tracked = self.sources[source].tracked
        texts = self.texts[source] if tracked is None else tracked[checkpoint]
        drawn = draw_texts(texts, self.prompts, f"prompts:{draw}")
        return pair_of(self.sources[source], drawn, checkpoint)


def draw_texts(texts: Sequence[int], count: int, draw: str) -> list[int]:
    """`count` different texts where there are as many, else all of them."""
    return sorted(Random(draw).sample(list(texts), min(count, len(texts))))


def condition_of(source: PreparedSource, texts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """``[prompts, positions, dim]`` and its mask."""
    embeddings, mask = np.array(source.embeddings[texts]), np.array(source.mask[texts])
    return torch.from_numpy(embeddings), torch.from_numpy(mask)


def pair_of(source: PreparedSource, texts: Sequence[int], checkpoint: int) -> PairBatch:
    return PairBatch(
        *condition_of(source, texts),
        torch.from_numpy(np.array(source.tokens[checkpoint])),
        texts=[[source.texts[index] for index in texts]] if source.texts else None,
    )


def stacked(pairs: Sequence[PairBatch]) -> PairBatch:
    condition, mask = stacked_conditions([(pair.condition, pair.mask) for pair in pairs])
    texts = [row for pair in pairs for row in pair.texts or ()] or None
    return PairBatch(condition, mask, torch.stack([pair.tokens for pair in pairs]), texts=texts)


def stacked_conditions(conditions: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Pads to the most prompts and positions; padding is off in the mask."""
    prompts = max(mask.shape[0] for _, mask in conditions)
    positions = max(mask.shape[1] for _, mask in conditions)
    dim = conditions[0][0].shape[-1]
    condition = torch.zeros(len(conditions), prompts, positions, dim)
    mask = torch.zeros(len(conditions), prompts, positions, dtype=torch.bool)
    for row, (one, its_mask) in enumerate(conditions):
        n, p = its_mask.shape
        condition[row, :n, :p], mask[row, :n, :p] = one, its_mask
    return condition, mask
