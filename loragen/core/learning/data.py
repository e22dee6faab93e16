"""Pairs to learn from: prompts of a dataset, with a checkpoint of that dataset.

Which pairs make up a step is a pure function of (seed, step). An optimizer step has `accumulation`
micro-batches, and each process works on its share of a micro-batch. Here steps, micro-batches and
positions are counted from 0.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from math import ceil
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from loragen.core.adapter.layout import Layout
from loragen.core.base.load import LanguageModel
from loragen.core.config import GenTrainConfig
from loragen.core.data.batches import batch_indices
from loragen.core.data.chat import pad_id
from loragen.core.data.tokenize import Example
from loragen.core.errors import UsageError
from loragen.core.generator.network import Normalization, importance
from loragen.core.learning.arrays import SourceArrays
from loragen.core.learning.plan import Phases
from loragen.core.lora.packing import Batch, Cost, collate, packing_cost
from loragen.core.protocols import SupportSet

MOST_VALIDATIONS = 8
"""A validation through the base takes the time of several steps."""
PACKED_MULTIPLE = 32
"""Packed sequences have a length of a multiple of it, because oneDNN keeps what it compiles for
every number of tokens: 200 of them take 1 GiB on the CPU in bfloat16, for four linear layers of the
sizes of SmolLM2."""


class PairBatch(NamedTuple):
    """Conditions, each with an adapter of its dataset."""

    condition: Tensor
    """``[batch, prompts, positions, dim]``"""
    mask: Tensor
    """``[batch, prompts, positions]`` bool"""
    tokens: Tensor
    """``[batch, tokens, token_dim]``: adapters, not normalised."""
    rows: Batch | None = None
    """Labelled rows for the base model, in equally many sequences for every adapter, in the
    adapters' order."""
    texts: list[list[str]] | None = None
    """The prompt texts of every condition if the encoder is trained; `condition` is empty then."""
    support: SupportSet | None = None
    """The datasets that the adapters are predicted from, for the objective `transfer`."""
    source: int | None = None
    """In validation on held-out texts: the index of the training source that they are of."""


class Split(NamedTuple):
    """How an optimizer step is divided: into micro-batches, and these over processes."""

    accumulation: int = 1
    process_index: int = 0
    num_processes: int = 1


class DistributedBatches(Dataset[PairBatch]):
    """A dataset whose item k is a process's share of micro-batch k; a subclass makes the pairs.

    Micro-batches cut an endless stream of shuffled epochs over `items` into equal pieces.
    """

    def __init__(self, items: int, batch_size: int, seed: int, split: Split, setting: str) -> None:
        """`batch_size` counts the pairs of a micro-batch of all processes; `setting` is its key.

        Raises UsageError if the processes cannot share it equally.
        """
        if batch_size % split.num_processes:
            raise UsageError(
                f"{setting} {batch_size} must be a multiple of {split.num_processes} devices: it "
                "counts the pairs of all of them"
            )
        self.items, self.batch_size, self.seed, self.split = items, batch_size, seed, split

    def drawn(self, k: int) -> tuple[int, list[tuple[int, int]]]:
        """Returns the optimizer step of micro-batch k, and its pairs of all processes, each as
        (position within the step, item)."""
        step, part = divmod(k, self.split.accumulation)
        size = self.batch_size
        whole = batch_indices(self.items, size * self.split.accumulation, self.seed, step)
        return step, [(at, whole[at]) for at in range(part * size, (part + 1) * size)]

    def own(self, k: int) -> tuple[int, list[tuple[int, int]]]:
        """Returns the same as `drawn`, but only the pairs of this process."""
        step, pairs = self.drawn(k)
        return step, pairs[self.split.process_index :: self.split.num_processes]


class PairBatches(DistributedBatches):
    """Micro-batches in which every checkpoint of every source comes equally often."""

    def __init__(
        self,
        sources: Sequence[SourceArrays],
        *,
        batch_size: int,
        prompts: int,
        seed: int,
        split: Split = Split(),  # noqa: B008  # immutable
    ) -> None:
        """`prompts` is the number of prompt texts of a condition."""
        self.sources, self.prompts = sources, prompts
        self.pairs = [(i, c) for i, source in enumerate(sources) for c in range(len(source.tokens))]
        super().__init__(len(self.pairs), batch_size, seed, split, "data.batch_size")

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps after which every checkpoint has been drawn at least once."""
        return ceil(len(self.pairs) / (self.batch_size * self.split.accumulation))

    def __getitem__(self, k: int) -> PairBatch:
        step, drawn = self.own(k)
        pairs = []
        for position, item in drawn:
            index, checkpoint = self.pairs[item]
            source = self.sources[index]
            draw = f"prompts:{self.seed}:{step}:{position}"
            texts = draw_texts(source.texts_of(checkpoint), self.prompts, draw)
            pairs.append(pair_of(source, texts, checkpoint))
        return stack_pairs(pairs)


def draw_texts(texts: Sequence[int], count: int, draw: str) -> list[int]:
    """Returns `count` different texts, or all if there are fewer; `draw` is the seed."""
    return sorted(Random(draw).sample(texts, min(count, len(texts))))


def condition_of(source: SourceArrays, texts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Returns ``[prompts, positions, dim]`` and its mask ``[prompts, positions]``."""
    embeddings, mask = np.array(source.embeddings[texts]), np.array(source.mask[texts])
    return torch.from_numpy(embeddings), torch.from_numpy(mask)


def pair_of(source: SourceArrays, texts: Sequence[int], checkpoint: int) -> PairBatch:
    """Returns one pair, without a batch dimension."""
    return PairBatch(
        *condition_of(source, texts),
        torch.from_numpy(np.array(source.tokens[checkpoint])),
        texts=[[source.texts[index] for index in texts]] if source.texts else None,
    )


def stack_pairs(pairs: Sequence[PairBatch]) -> PairBatch:
    """Returns a batch of single pairs."""
    condition, mask = stack_conditions([(pair.condition, pair.mask) for pair in pairs])
    texts = [row for pair in pairs for row in pair.texts or ()] or None
    return PairBatch(condition, mask, torch.stack([pair.tokens for pair in pairs]), texts=texts)


def stack_conditions(conditions: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Returns ``[batch, prompts, positions, dim]`` and its mask, padded to the largest one."""
    prompts = max(mask.shape[0] for _, mask in conditions)
    positions = max(mask.shape[1] for _, mask in conditions)
    dim = conditions[0][0].shape[-1]
    condition = torch.zeros(len(conditions), prompts, positions, dim)
    mask = torch.zeros(len(conditions), prompts, positions, dtype=torch.bool)
    for row, (values, valid) in enumerate(conditions):
        n, p = valid.shape
        condition[row, :n, :p], mask[row, :n, :p] = values, valid
    return condition, mask


class TrainingData(LightningDataModule):
    """The data that a generator is trained and validated on; objectives are created from it."""

    phases: Phases
    """Set once the objectives exist."""

    def __init__(
        self,
        config: GenTrainConfig,
        layout: Layout,
        normalization: Normalization,
        adapter_config: Mapping[str, Any],
        sources: Sequence[SourceArrays],
        val_sources: Sequence[SourceArrays] = (),
        base: LanguageModel | None = None,
    ) -> None:
        """`val_sources` are datasets for validation alone; `base` is None if no objective needs the
        base model, and the sources have no labelled rows then."""
        super().__init__()
        self.config, self.layout, self.normalization = config, layout, normalization
        self.adapter_config = adapter_config
        self.sources, self.val_sources, self.base = sources, val_sources, base

    def split(self, process_index: int, num_processes: int) -> Split:
        return Split(self.config.trainer.accumulate_grad_batches, process_index, num_processes)

    def pairs(self, process_index: int = 0, num_processes: int = 1) -> PairBatches:
        """Returns batches of conditions and collected adapters, as the section `data` configures
        them."""
        return PairBatches(
            self.sources,
            batch_size=self.config.data.batch_size,
            prompts=self.config.data.prompts_per_condition,
            seed=self.config.seed,
            split=self.split(process_index, num_processes),
        )

    @cached_property
    def token_weights(self) -> Tensor:
        """The weight of each token's error, ``[tokens, 1]``, with mean 1 over the values."""
        if not self.config.training.importance:
            return torch.ones(self.layout.tokens, 1)
        return importance(self.layout, [source.tokens for source in self.sources])

    @cached_property
    def cost(self) -> Cost | None:
        """The cost of a packed batch of labelled rows; None if they are padded. It is determined by
        the first batch that has rows, when the base is on its device."""
        assert self.base is not None
        sources = (*self.sources, *self.val_sources)
        rows = [row for source in sources if source.rows for row in source.rows.longest]
        each = self.config.behaviour.rows_per_adapter
        return packing_cost(self.base.model, rows, pad_id(self.base.tokenizer), each)

    def collate(self, rows: Sequence[Example], adapters: int = 1) -> Batch:
        """Returns labelled rows for the base, equally many for each of the adapters: packed if the
        base can be packed."""
        assert self.base is not None
        multiple = PACKED_MULTIPLE if self.cost else 1
        padding = pad_id(self.base.tokenizer)
        return collate(rows, padding, self.cost, groups=adapters, multiple=multiple)

    @property
    def sources_with_val_texts(self) -> list[SourceArrays]:
        """The training sources of which some texts are held out."""
        return [source for source in self.sources if source.val_texts]

    @property
    def val_every(self) -> int | None:
        """Optimizer steps from one validation to the next; None if nothing is held out."""
        if not (self.val_sources or self.sources_with_val_texts):
            return None
        epochs, epoch = self.config.training.val_every_epochs, self.phases.steps_per_epoch
        total = self.phases.total
        every = epochs * epoch if epochs else max(epoch, ceil(total / MOST_VALIDATIONS))
        return min(every, total)

    @property
    def validates_rows(self) -> bool:
        """Whether every dataset by which a step is selected has held-out rows for the base."""
        if self.base is None or not self.config.training.val_rows:
            return False
        if self.val_sources:
            return all(source.rows for source in self.val_sources)
        return all(one.rows and one.rows.validation for one in self.sources_with_val_texts)

    def train_dataloader(self) -> DataLoader[PairBatch]:
        """Returns the micro-batches from the trainer's step on, counted from 0 in each phase."""
        assert self.trainer is not None
        share = self.trainer.global_rank, self.trainer.world_size
        accumulation = self.config.trainer.accumulate_grad_batches
        batches = {phase.name: phase.objective.batches(*share) for phase in self.phases}

        def batch(k: int) -> PairBatch:
            step, part = divmod(k, accumulation)
            phase, within = self.phases.at(step + 1)
            found: PairBatch = batches[phase.name][(within - 1) * accumulation + part]
            return found

        first, last = self.trainer.global_step, self.trainer.max_steps
        remaining = range(first * accumulation, last * accumulation)
        computed = Computed(batch, last * accumulation)
        return DataLoader(computed, batch_size=None, sampler=remaining)

    def val_dataloader(self) -> list[DataLoader[PairBatch]]:
        """Returns a loader of held-out texts and one of held-out datasets; either may be empty.

        Each dataset gives one pair, always the same: some of its texts with its last checkpoint.
        """

        def pair(sources: Sequence[SourceArrays], index: int) -> PairBatch:
            source, draw = sources[index], f"validation:{self.config.seed}"
            texts = range(len(source.embeddings)) if sources is val_sources else source.val_texts
            drawn = draw_texts(texts, self.config.data.prompts_per_condition, draw)
            batch = stack_pairs([pair_of(source, drawn, len(source.tokens) - 1)])
            if sources is not val_sources:
                batch = batch._replace(source=self.sources.index(source))
            count = self.config.training.val_rows
            if self.base and source.rows and source.rows.validation and count:
                batch = batch._replace(rows=self.collate(source.rows.validation[:count]))
            return batch

        val_sources = list(self.val_sources)
        return [
            DataLoader(Computed(partial(pair, sources), len(sources)), batch_size=None)
            for sources in (self.sources_with_val_texts, val_sources)
        ]


class Computed(Dataset[PairBatch]):
    """Batches that are computed when they are read, because all would fill the memory."""

    def __init__(self, compute: Callable[[int], PairBatch], count: int) -> None:
        self.compute, self.count = compute, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> PairBatch:
        return self.compute(index)
