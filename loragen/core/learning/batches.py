"""Pairs to learn from: some prompts of a dataset, with a checkpoint of that dataset.

Which pairs make up a step is a pure function of (seed, step), as for LoRA training; devices and
accumulation rounds take their parts of it.

Batches for training through the base: adapters of several datasets, each with its rows.
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
from loragen.core.data.tokenize import Example
from loragen.core.learning.arrays import SourceArrays
from loragen.core.learning.plan import Phases
from loragen.core.learning.texts import LabelledRows
from loragen.core.lora.packing import Batch, padded


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
        sources: Sequence[SourceArrays],
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


def condition_of(source: SourceArrays, texts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """``[prompts, positions, dim]`` and its mask."""
    embeddings, mask = np.array(source.embeddings[texts]), np.array(source.mask[texts])
    return torch.from_numpy(embeddings), torch.from_numpy(mask)


def pair_of(source: SourceArrays, texts: Sequence[int], checkpoint: int) -> PairBatch:
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


MOST_OTHERS = 64
"""Datasets that an adapter is written from, so that a step does not grow with their number."""


class BehaviourBatches(Dataset[PairBatch]):
    """Item k is the k-th micro-batch, `parts` to an optimizer step, for one device.

    Every dataset comes equally often, whatever the number of its checkpoints.
    """

    def __init__(
        self,
        sources: Sequence[SourceArrays],
        texts: Sequence[Sequence[int]],
        rows: Sequence[LabelledRows],
        *,
        batch_size: int,
        rows_per_adapter: int,
        prompts: int,
        pad_id: int,
        seed: int,
        parts: int = 1,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        """`texts[i]` and `rows[i]` are those of source i that may be drawn; `batch_size` counts the
        adapters of a micro-batch, of all devices."""
        self.sources, self.texts, self.rows = sources, texts, rows
        self.batch_size, self.rows_per_adapter = batch_size, rows_per_adapter
        self.prompts, self.pad_id, self.seed = prompts, pad_id, seed
        self.parts, self.rank, self.ranks = parts, rank, ranks

    def __getitem__(self, k: int) -> PairBatch:
        size = self.batch_size
        step, part = divmod(k, self.parts)
        batch = self._datasets(k)
        pairs, examples = [], []
        for place in range(self.rank, size, self.ranks):
            chance = Random(f"behaviour:{self.seed}:{step}:{part * size + place}")
            pair, some = self._drawn(batch[place], chance)
            pairs.append(pair)
            examples += some
        return stacked(pairs)._replace(rows=padded(examples, self.pad_id))

    def _datasets(self, k: int) -> list[int]:
        """Of the adapters of a micro-batch, of all devices."""
        size = self.batch_size
        step, part = divmod(k, self.parts)
        batch = batch_indices(len(self.sources), size * self.parts, self.seed, step)
        return list(batch[part * size : (part + 1) * size])

    def _drawn(self, index: int, chance: Random) -> tuple[PairBatch, list[Example]]:
        source, rows = self.sources[index], self.rows[index].training
        checkpoint = chance.randrange(len(source.tokens))
        drawn = self._texts(index, checkpoint, chance)
        return pair_of(source, drawn, checkpoint), equally_many(rows, self.rows_per_adapter, chance)

    def _texts(self, index: int, checkpoint: int | None, chance: Random) -> list[int]:
        """Some of the dataset's texts, or of the checkpoint's own where it has such."""
        tracked = self.sources[index].tracked
        texts = self.texts[index] if tracked is None or checkpoint is None else tracked[checkpoint]
        return draw_texts(texts, self.prompts, f"prompts:{chance.random()}")


class TransferBatches(BehaviourBatches):
    """The same, with conditions of datasets that have no adapter in the micro-batch, nor another
    source of theirs."""

    def __getitem__(self, k: int) -> PairBatch:
        return super().__getitem__(k)._replace(others=self._others(k))

    def _others(self, k: int) -> Others:
        left_out = {self.sources[index].dataset for index in self._datasets(k)}
        chance = Random(f"others:{self.seed}:{k}")
        left = [i for i, source in enumerate(self.sources) if source.dataset not in left_out]
        chosen = sorted(chance.sample(left, min(MOST_OTHERS, len(left))))
        conditions = [
            condition_of(self.sources[index], self._texts(index, None, chance)) for index in chosen
        ]
        return Others(*stacked_conditions(conditions), torch.tensor(chosen))


class PhasedBatches(Dataset[PairBatch]):
    """Item k belongs to the phase that its optimizer step is in."""

    def __init__(
        self,
        phases: Phases,
        reconstruction: Dataset[PairBatch],
        behaviour: BehaviourBatches | None,
        parts: int,
    ) -> None:
        self.phases, self.parts = phases, parts
        self._of = {
            "reconstruction": reconstruction,
            "behaviour": behaviour,
            "transfer": behaviour,
        }

    def __getitem__(self, k: int) -> PairBatch:
        step, part = divmod(k, self.parts)
        phase, within = self.phases.at(step + 1)
        batches = self._of[phase.objective]
        assert batches is not None
        return batches[(within - 1) * self.parts + part]


def equally_many(rows: Sequence[Example], count: int, chance: Random) -> list[Example]:
    """`count` rows, no two the same where there are as many."""
    return chance.sample(rows, count) if len(rows) >= count else chance.choices(rows, k=count)


def validation_rows(rows: LabelledRows, most: int, pad_id: int) -> Batch | None:
    """The first held-out rows, the same at every validation; None where there are none."""
    return padded(rows.held_out[:most], pad_id) if most and rows.held_out else None
