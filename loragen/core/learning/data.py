"""The behaviour phase made ready: the base, and the labelled rows of every dataset.

What a generator trains and validates on, from the first step to the last.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from loragen.core.base.load import LanguageModel, load_training_base
from loragen.core.base.names import BaseDtype
from loragen.core.config import GenTrainConfig, LoraTrainConfig
from loragen.core.data.tokenize import pad_id
from loragen.core.errors import UsageError
from loragen.core.learning.arrays import SourceArrays
from loragen.core.learning.batches import (
    BehaviourBatches,
    PairBatch,
    PairBatches,
    PhasedBatches,
    TransferBatches,
    draw_texts,
    pair_of,
    stacked,
    validation_rows,
)
from loragen.core.learning.plan import Objective, Plan, StepPlan, step_plan
from loragen.core.learning.sources import TrainingSource
from loragen.core.learning.texts import (
    LabelledRows,
    groups_of,
    has_rows,
    held_out_texts,
    labelled_rows,
)


@dataclass(frozen=True)
class Rehearsal:
    """What generated adapters are tried on."""

    base: LanguageModel
    rows: list[LabelledRows]
    """Of every dataset that is learned from."""
    unseen: list[LabelledRows | None]
    """Of every dataset that is held out whole; None where its labels are not known."""

    @property
    def pad_id(self) -> int:
        return pad_id(self.base.tokenizer)


def rehearsal(work: Plan, base_dtype: BaseDtype = "") -> Rehearsal | None:
    """The base, and the rows in tokens. None where the objective does not need them.

    The base is in the dtype that `lora train` would choose for it; a run that goes on names the
    one that it had, since other hardware might choose otherwise. Raises UsageError where rows are
    missing.
    """
    config = work.config
    if config.training.objective == "reconstruction":
        return None
    settings = LoraTrainConfig(base_model=config.behaviour.base_model or work.base_model)
    settings.trainer.accelerator = config.trainer.accelerator
    base = load_training_base(settings.model_copy(update={"base_dtype": base_dtype or "auto"}))

    def rows_of(source: TrainingSource) -> LabelledRows:
        held_out = [prompt for group in groups_of(source, config).val for prompt in group]
        return labelled_rows(
            source, held_out, base.tokenizer, config.behaviour.max_length, config.seed
        )

    return Rehearsal(
        base,
        [rows_of(source) for source in work.sources],
        [_all_of(source, work, base) if has_rows(source) else None for source in work.unseen],
    )


def _all_of(source: TrainingSource, work: Plan, base: LanguageModel) -> LabelledRows:
    """Held out whole."""
    config = work.config
    rows = labelled_rows(source, [], base.tokenizer, config.behaviour.max_length, config.seed)
    return LabelledRows([], rows.training)


class GeneratorData(LightningDataModule):
    """Pairs and rows to train on; validation with held-out texts, and with held-out datasets."""

    def __init__(
        self,
        sources: Sequence[SourceArrays],
        unseen: Sequence[SourceArrays],
        config: GenTrainConfig,
        rehearsal: Rehearsal | None = None,
    ) -> None:
        """`rehearsal` is for training through the base model, and for validating with it."""
        super().__init__()
        self.sources, self.unseen = sources, unseen
        self.config, self.rehearsal = config, rehearsal
        self.parts = config.trainer.accumulate_grad_batches
        """Micro-batches to an optimizer step."""
        splits = [_split_texts(one, config.data.val_ratio, config.seed) for one in sources]
        self.train_texts = [split[0] for split in splits]
        self.val_texts = [split[1] for split in splits]
        self.plan: StepPlan = step_plan(config, self._pairs(0, 1).steps_per_epoch)

    @property
    def both(self) -> list[SourceArrays]:
        """What is learned from, then what is held out whole."""
        return [*self.sources, *self.unseen]

    @property
    def validates(self) -> bool:
        """Whether anything is held out."""
        return bool(self.unseen) or any(self.val_texts)

    @property
    def tries_rows(self) -> bool:
        """Whether every validation can ask the base model, and has rows to ask it about."""
        if self.rehearsal is None or not self.config.training.val_rows:
            return False
        if self.unseen:
            return all(self.rehearsal.unseen)
        pairs = zip(self.rehearsal.rows, self.val_texts, strict=True)
        return all(rows.held_out for rows, texts in pairs if texts)

    def adapters_per_step(self, objective: Objective) -> int:
        """Of an optimizer step, over all devices and micro-batches."""
        section = self.config.data if objective == "reconstruction" else self.config.behaviour
        return section.batch_size * self.parts

    def check_shared(self, ranks: int) -> None:
        """Before the walk begins: with `devices: auto` nobody has known how many there are.

        Raises UsageError where `ranks` devices cannot share a batch equally."""
        if self.plan.phases.reconstruction:
            _check_shared(ranks, "data.batch_size", self.config.data.batch_size)
        if self.plan.phases.behaviour:
            _check_shared(ranks, "behaviour.batch_size", self.config.behaviour.batch_size)

    def train_dataloader(self) -> DataLoader[PairBatch]:
        """From the step the trainer stands at."""
        assert self.trainer is not None
        batches = self.train_batches(self.trainer.global_rank, self.trainer.world_size)
        first, last = self.trainer.global_step, self.trainer.max_steps
        remaining = range(first * self.parts, last * self.parts)
        return DataLoader(batches, batch_size=None, sampler=remaining)

    def train_batches(self, rank: int = 0, ranks: int = 1) -> PhasedBatches:
        pairs, tried = self._pairs(rank, ranks), self._tried(rank, ranks)
        return PhasedBatches(self.plan.phases, pairs, tried, self.parts)

    def _pairs(self, rank: int, ranks: int) -> PairBatches:
        data = self.config.data
        return PairBatches(
            self.sources,
            self.train_texts,
            batch_size=data.batch_size,
            prompts=data.prompts_per_condition,
            seed=self.config.seed,
            parts=self.parts,
            rank=rank,
            ranks=ranks,
        )

    def _tried(self, rank: int, ranks: int) -> BehaviourBatches | None:
        if self.rehearsal is None:
            return None
        kind = TransferBatches if self.plan.transfers else BehaviourBatches
        return kind(
            self.sources,
            self.train_texts,
            self.rehearsal.rows,
            batch_size=self.config.behaviour.batch_size,
            rows_per_adapter=self.config.behaviour.rows_per_adapter,
            prompts=self.config.data.prompts_per_condition,
            pad_id=self.rehearsal.pad_id,
            seed=self.config.seed,
            parts=self.parts,
            rank=rank,
            ranks=ranks,
        )

    def val_dataloader(self) -> list[DataLoader[PairBatch]]:
        """One loader for held-out texts, one for held-out datasets; either may be empty."""
        known = self.rehearsal.rows if self.rehearsal else [None] * len(self.sources)
        new = self.rehearsal.unseen if self.rehearsal else [None] * len(self.unseen)
        seen = [
            partial(self._validation_pair, source, texts, rows)
            for source, texts, rows in zip(self.sources, self.val_texts, known, strict=True)
            if texts
        ]
        unseen = [
            partial(self._validation_pair, source, range(len(source.embeddings)), rows)
            for source, rows in zip(self.unseen, new, strict=True)
        ]
        return [DataLoader(_Made(makers), batch_size=None) for makers in (seen, unseen)]

    def _validation_pair(
        self, source: SourceArrays, texts: Sequence[int], rows: LabelledRows | None
    ) -> PairBatch:
        """Some texts of a dataset with its last checkpoint; the same pair at every validation."""
        drawn = draw_texts(
            texts, self.config.data.prompts_per_condition, f"validation:{self.config.seed}"
        )
        pair = stacked([pair_of(source, drawn, len(source.tokens) - 1)])
        if rows is None or self.rehearsal is None:
            return pair
        tried = validation_rows(rows, self.config.training.val_rows, self.rehearsal.pad_id)
        return pair._replace(rows=tried)


class _Made(Dataset[PairBatch]):
    """Pairs that are made when they are asked for: of many datasets they would fill the memory."""

    def __init__(self, makers: Sequence[Callable[[], PairBatch]]) -> None:
        self.makers = makers

    def __len__(self) -> int:
        return len(self.makers)

    def __getitem__(self, index: int) -> PairBatch:
        return self.makers[index]()


def _check_shared(ranks: int, setting: str, size: int) -> None:
    if size % ranks:
        raise UsageError(
            f"{setting} {size} must be a multiple of {ranks} devices: it counts the pairs of all"
        )


def _split_texts(source: SourceArrays, ratio: float, seed: int) -> tuple[list[int], list[int]]:
    texts = len(source.embeddings)
    if source.held_out is None:
        return held_out_texts(texts, ratio, seed)
    return sorted({*range(texts)} - {*source.held_out}), list(source.held_out)
