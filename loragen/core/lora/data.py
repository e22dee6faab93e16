"""The batches of LoRA training: micro-batches that depend on (seed, step) alone."""

import logging
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from math import ceil
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from loragen.core.config import LoraTrainConfig
from loragen.core.data.batches import batch_indices, micro_batch, train_val_split
from loragen.core.data.chat import log_notes, set_chat_date, set_template_kwargs
from loragen.core.data.dataset import Dataset
from loragen.core.data.tokenize import Example, TokenizedRows, examples_hash, fitting_rows
from loragen.core.errors import DataError, UsageError
from loragen.core.lora.packing import Batch, Cost, collate, packing_cost
from loragen.core.run.directory import DatasetRecord

log = logging.getLogger(__name__)

FIRST, DRAWN = "first:", "drawn:"
"""The prefixes of a hash of tokens: of the rows that a run draws first, and, in older manifests, of
all rows that it draws. Manifests that are older still hash all rows, without a prefix."""
CHECKED = 512
"""Rows that are tokenised before a run begins, of those that it draws first and of the validation
rows: enough to notice another tokenizer or chat template. All others are tokenised by the step that
draws them."""
LONGEST = 64
"""Rows with the most characters, which are tokenised too: they decide whether rows are packed."""


@dataclass(frozen=True)
class TrainingRows:
    """The rows of a run, tokenised when they are used."""

    training: TokenizedRows
    validation: TokenizedRows
    longest: Sequence[Example]
    """Of the training rows that the steps of the run draw, the `LONGEST` in characters."""
    record: DatasetRecord
    """The dataset as the manifest records it."""


def load_rows(
    config: LoraTrainConfig,
    dataset: Dataset,
    tokenizer: Any,
    validation: Dataset | None = None,
    recorded: str = "",
    date: str = "",
) -> TrainingRows:
    """Reads a dataset and splits off the validation rows.

    All rows are validated, and few of them tokenised. `validation` is `config.data.validation`, if
    that is open already. `recorded` is the hash of tokens in the manifest of a run that resumes: it
    decides which rows are hashed again; `date` is the date that its chat template has written.
    Raises UsageError for a missing file, DataError for bad rows (unless they are to be skipped) or
    no rows to train on, LoragenError for a tokenizer or a chat template that cannot be used.
    """
    set_chat_date(tokenizer, date)
    set_template_kwargs(tokenizer, config.chat_template_kwargs)
    if config.data.validation and validation is None:
        validation = Dataset.at(config.data.validation)
    skip, length = config.data.skip_bad_rows, config.data.max_length
    rows = fitting_rows(tokenizer, dataset, dataset.rows(skip), skip, length)
    train_indices, val_indices = train_val_split(len(rows), config.data.val_ratio, config.seed)
    if not train_indices:
        raise DataError(
            f"{dataset}: data.val_ratio leaves no rows to train on ({len(rows)} in all)"
        )
    train_rows, val_rows = rows.subset(train_indices), rows.subset(val_indices)
    # The steps draw the first rows of a stream of shuffled epochs, which may be all rows.
    num_drawn = min(len(train_rows), config.training.max_steps * config.training.batch_size)
    drawn = batch_indices(len(train_rows), num_drawn, config.seed, step=0)
    first, longest = sorted(drawn[:CHECKED]), train_rows.longest(drawn, LONGEST)
    if recorded.startswith(DRAWN):
        tokens = DRAWN + _tokens_hash(train_rows, sorted(drawn), val_rows, len(val_rows))
    elif recorded and not recorded.startswith(FIRST):
        tokens = examples_hash(rows)
    else:
        tokens = FIRST + _tokens_hash(train_rows, first, val_rows, CHECKED)
    record = DatasetRecord(
        name=dataset.name,
        path=dataset.location,
        sha256=dataset.sha256,
        rows=len(rows),
        tokens=tokens,
        too_long=[row.line for row in rows.left_out],
        validation=validation.sha256 if validation else "",
    )
    _warn(config, dataset, tokenizer, train_rows, {*first, *longest})
    if validation:
        val_rows = fitting_rows(tokenizer, validation, validation.rows(skip), skip, length)
    if val_rows:
        looked_at = {*range(min(CHECKED, len(val_rows)))}
        looked_at |= {*val_rows.longest(range(len(val_rows)), LONGEST)}
        _warn(config, validation or dataset, tokenizer, val_rows, looked_at)
    return TrainingRows(train_rows, val_rows, [train_rows[i] for i in longest], record)


def _tokens_hash(
    training: TokenizedRows, indices: Sequence[int], validation: TokenizedRows, num_val: int
) -> str:
    """Returns a hash of some training rows and of the first validation rows, in tokens."""
    return examples_hash(chain((training[i] for i in indices), validation[:num_val]))


def _warn(
    config: LoraTrainConfig,
    dataset: Dataset,
    tokenizer: Any,
    rows: TokenizedRows,
    looked_at: set[int],
) -> None:
    """Logs what is odd about rows, and one warning if some lose a part of their prompt; `looked_at`
    are the indices of those that are tokenised to find out, the longest among them."""
    log_notes(tokenizer, [rows.rows[index] for index in sorted(looked_at)], dataset.source)
    if num_cut := sum(map(rows.is_cut, looked_at)):
        which = "" if len(looked_at) == len(rows) else f"looked at (of {len(rows)}) "
        log.warning(
            "%s: %d of %d rows %sare longer than data.max_length %d and lose the middle of their "
            "prompt; `loragen data preview` counts all of them",
            dataset,
            num_cut,
            len(looked_at),
            which,
            config.data.max_length,
        )


@dataclass(frozen=True)
class MicroBatches(TorchDataset[Batch]):
    """The micro-batches of one process: item ``k`` is accumulation round ``k % num_accumulation``
    of step ``k // num_accumulation``, both counted from 0."""

    rows: Sequence[Example]
    pad_id: int
    cost: Cost | None
    """The cost of a packed batch; None: batches are padded."""
    batch_size: int
    """Rows of a whole optimizer step, over all processes and accumulation rounds."""
    seed: int
    num_accumulation: int = 1
    process_index: int = 0
    num_processes: int = 1
    window: int | None = None
    """The model's sliding window in tokens, if it has one."""

    def __getitem__(self, k: int) -> Batch:
        step, accumulation = divmod(k, self.num_accumulation)
        batch = batch_indices(len(self.rows), self.batch_size, self.seed, step)
        step_label_tokens = sum(self.rows[index].num_label_tokens for index in batch)
        mine = micro_batch(
            batch, self.process_index, self.num_processes, accumulation, self.num_accumulation
        )
        rows = [self.rows[index] for index in mine]
        cost = cost_within(self.window, self.cost, rows)
        return collate(rows, self.pad_id, cost, step_label_tokens)


@dataclass(frozen=True)
class ValidationBatches(TorchDataset[Batch]):
    """All validation rows, in order."""

    rows: Sequence[Example]
    pad_id: int
    cost: Cost | None
    batch_size: int
    window: int | None = None

    def __len__(self) -> int:
        return ceil(len(self.rows) / self.batch_size)

    def __getitem__(self, k: int) -> Batch:
        rows = self.rows[k * self.batch_size : (k + 1) * self.batch_size]
        return collate(rows, self.pad_id, cost_within(self.window, self.cost, rows))


def cost_within(window: int | None, cost: Cost | None, rows: Sequence[Example]) -> Cost | None:
    """Returns the cost of packing these rows, or None if one of them is longer than the model's
    sliding window, in which packed rows would see less than they see alone."""
    return None if window and max(len(row.ids) for row in rows) > window else cost


class LoraDataModule(LightningDataModule):
    """Training batches from the trainer's current step on, and the validation rows."""

    def __init__(self, rows: TrainingRows, config: LoraTrainConfig, pad_id: int) -> None:
        super().__init__()
        self.rows, self.config, self.pad_id = rows, config, pad_id

    def check_divisible(self, num_processes: int, num_accumulation: int) -> None:
        """Checks that processes and accumulation rounds share a step equally. Their number is not
        known before there is a trainer, because of `devices: auto`.

        Raises UsageError if they do not, or if limit_train_batches leaves no whole step.
        """
        size, limit = self.config.training.batch_size, self.config.trainer.limit_train_batches
        if size % (num_accumulation * num_processes):
            raise UsageError(
                f"training.batch_size {size} must be a multiple of {num_processes} devices x "
                f"{num_accumulation} accumulate_grad_batches: it counts the rows of a whole step"
            )
        if not self._last_step(num_accumulation):
            raise UsageError(f"trainer.limit_train_batches {limit} leaves no whole step")

    @cached_property
    def cost(self) -> Cost | None:
        """The cost of a packed batch; None if batches are padded. It is determined once the model
        is on its device, because a forward pass shows whether it can be packed."""
        if not self.config.training.packing:
            return None
        trainer = self.trainer
        assert trainer is not None
        rounds = trainer.accumulate_grad_batches * trainer.world_size
        rows = self.config.training.batch_size // rounds
        model = trainer.lightning_module.model
        return packing_cost(model, self.rows.longest, self.pad_id, rows)

    @property
    def window(self) -> int | None:
        """The sliding window (tokens) of a model that is packed. The packing check sees the longest
        rows in characters, and another row may have more tokens."""
        if self.cost is None:
            return None
        assert self.trainer is not None
        model: Any = self.trainer.lightning_module.model
        window: int | None = getattr(model.config.get_text_config(), "sliding_window", None)
        return window

    def train_dataloader(self) -> DataLoader[Batch]:
        trainer = self.trainer
        assert trainer is not None
        accumulation = trainer.accumulate_grad_batches
        remaining = range(
            trainer.global_step * accumulation, self._last_step(accumulation) * accumulation
        )
        batches = MicroBatches(
            self.rows.training,
            self.pad_id,
            self.cost,
            self.config.training.batch_size,
            self.config.seed,
            accumulation,
            trainer.global_rank,
            trainer.world_size,
            self.window,
        )
        return DataLoader(
            batches,
            batch_size=None,
            sampler=remaining,
            num_workers=self.config.data.workers,
            worker_init_fn=ignore_interrupts,
        )

    def _last_step(self, num_accumulation: int) -> int:
        """Returns the step at which limit_train_batches ends the run; that is a number of
        micro-batches of the whole run (int) or a share of them (float)."""
        limit, max_steps = self.config.trainer.limit_train_batches, self.config.training.max_steps
        if limit is None:
            return max_steps
        share = isinstance(limit, float)
        batches = int(limit * max_steps * num_accumulation) if share else int(limit)
        return min(max_steps, batches // num_accumulation)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Every process gets all validation rows, so that all make the same decisions."""
        size = self.config.training.batch_size
        batches = ValidationBatches(self.rows.validation, self.pad_id, self.cost, size, self.window)
        return DataLoader(batches, batch_size=None)


def ignore_interrupts(worker: int) -> None:  # noqa: ARG001  # signature fixed by DataLoader
    """Ignores Ctrl+C, which reaches every process of a terminal: the step that is finished and
    saved after it needs its batch."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
