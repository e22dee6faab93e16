"""Pairs to learn from: some prompts of a dataset, with a checkpoint of that dataset.

Which pairs make up a step is a pure function of (seed, step), as for LoRA training; devices and
accumulation rounds take their parts of it.
"""

from collections.abc import Iterator, Sequence
from math import ceil
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from loragen.core.data.batches import batch_indices
from loragen.core.generator.sources import PreparedSource
from loragen.core.generator.texts import held_out_texts
from loragen.core.lora.batch import Batch


class PairBatch(NamedTuple):
    condition: Tensor
    """``[batch, prompts, positions, dim]``"""
    mask: Tensor
    """``[batch, prompts, positions]`` bool"""
    tokens: Tensor
    """``[batch, tokens, token_dim]``: adapters, not normalised."""
    rows: Batch | None = None
    """Where the behaviour is judged: equally many rows of every adapter's dataset, in order."""


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


class EpochBatches(Sampler[int]):
    """The micro-batches of the epoch the trainer stands in."""

    def __init__(self, data: "PairDataModule", batches_per_epoch: int) -> None:
        self.data, self.batches_per_epoch = data, batches_per_epoch

    def __len__(self) -> int:
        return self.batches_per_epoch

    def __iter__(self) -> Iterator[int]:
        assert self.data.trainer is not None
        first = self.data.trainer.current_epoch * self.batches_per_epoch
        return iter(range(first, first + self.batches_per_epoch))


class PairDataModule(LightningDataModule):
    """Training pairs; validation pairs from held-out prompt texts, and from held-out datasets."""

    def __init__(
        self,
        sources: Sequence[PreparedSource],
        unseen: Sequence[PreparedSource],
        *,
        batch_size: int,
        prompts: int,
        val_ratio: float,
        seed: int,
        parts: int = 1,
    ) -> None:
        """`val_ratio` is for sources that do not say which of their texts are held out; `parts`:
        micro-batches to an optimizer step."""
        super().__init__()
        self.sources, self.unseen = sources, unseen
        self.batch_size, self.prompts = batch_size, prompts
        self.seed, self.parts = seed, parts
        splits = [_split_texts(source, val_ratio, seed) for source in sources]
        self.train_texts = [split[0] for split in splits]
        self.val_texts = [split[1] for split in splits]

    def train_batches(self, rank: int = 0, ranks: int = 1) -> PairBatches:
        return PairBatches(
            self.sources,
            self.train_texts,
            batch_size=self.batch_size,
            prompts=self.prompts,
            seed=self.seed,
            parts=self.parts,
            rank=rank,
            ranks=ranks,
        )

    def train_dataloader(self) -> DataLoader[PairBatch]:
        assert self.trainer is not None
        batches = self.train_batches(self.trainer.global_rank, self.trainer.world_size)
        sampler = EpochBatches(self, batches.steps_per_epoch * self.parts)
        return DataLoader(batches, batch_size=None, sampler=sampler)

    def val_dataloader(self) -> list[DataLoader[PairBatch]]:
        """One loader for held-out texts, one for held-out datasets; either may be empty."""
        seen = [
            self._validation_pair(source, texts)
            for source, texts in zip(self.sources, self.val_texts, strict=True)
            if texts
        ]
        unseen = [self._validation_pair(s, range(len(s.embeddings))) for s in self.unseen]
        return [DataLoader(pairs, batch_size=None) for pairs in (seen, unseen)]  # type: ignore[arg-type]  # a list is a map-style dataset

    def _validation_pair(self, source: PreparedSource, texts: Sequence[int]) -> PairBatch:
        """Some texts of a dataset with its last checkpoint; the same pair at every validation."""
        drawn = draw_texts(texts, self.prompts, f"validation:{self.seed}")
        return stacked([pair_of(source, drawn, len(source.tokens) - 1)])


def _split_texts(source: PreparedSource, ratio: float, seed: int) -> tuple[list[int], list[int]]:
    texts = len(source.embeddings)
    if source.held_out is None:
        return held_out_texts(texts, ratio, seed)
    return sorted({*range(texts)} - {*source.held_out}), list(source.held_out)


def pair_of(source: PreparedSource, texts: Sequence[int], checkpoint: int) -> PairBatch:
    return PairBatch(
        torch.from_numpy(np.array(source.embeddings[texts])),
        torch.from_numpy(np.array(source.mask[texts])),
        torch.from_numpy(np.array(source.tokens[checkpoint])),
    )


def stacked(pairs: Sequence[PairBatch]) -> PairBatch:
    """Pads to the most prompts and positions; padding is off in the mask."""
    prompts = max(pair.mask.shape[0] for pair in pairs)
    positions = max(pair.mask.shape[1] for pair in pairs)
    dim = pairs[0].condition.shape[-1]
    condition = torch.zeros(len(pairs), prompts, positions, dim)
    mask = torch.zeros(len(pairs), prompts, positions, dtype=torch.bool)
    for row, pair in enumerate(pairs):
        n, p = pair.mask.shape
        condition[row, :n, :p], mask[row, :n, :p] = pair.condition, pair.mask
    return PairBatch(condition, mask, torch.stack([pair.tokens for pair in pairs]))
