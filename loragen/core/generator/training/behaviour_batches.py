"""Batches for training through the base: adapters of several datasets, each with its rows."""

from collections.abc import Sequence
from random import Random

import torch
from torch.utils.data import Dataset

from loragen.core.data.batches import batch_indices
from loragen.core.data.tokenize import Example
from loragen.core.generator.collections.prepared import PreparedSource
from loragen.core.generator.collections.rows import LabelledRows
from loragen.core.generator.training.pairs import (
    Others,
    PairBatch,
    condition_of,
    draw_texts,
    pair_of,
    stacked,
    stacked_conditions,
)
from loragen.core.generator.training.phases import Phases
from loragen.core.lora.batch import Batch, padded

MOST_OTHERS = 64
"""Datasets that an adapter is written from, so that a step does not grow with their number."""


class BehaviourBatches(Dataset[PairBatch]):
    """Item k is the k-th micro-batch, `parts` to an optimizer step, for one device.

    Every dataset comes equally often, whatever the number of its checkpoints.
    """

    def __init__(
        self,
        sources: Sequence[PreparedSource],
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
