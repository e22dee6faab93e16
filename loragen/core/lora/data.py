"""A dataset's rows, tokenised, as micro-batches that depend on (seed, step, rank, part) alone."""

import logging
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from loragen.core.config import LoraTrainConfig
from loragen.core.data.batches import batch_indices, held_out, micro_batch
from loragen.core.data.documents import Source, content_hash, location, parsed_source
from loragen.core.data.rows import BadRow, Row, read_rows, refuse_bad, warn_of_bad
from loragen.core.data.tokenize import Example, examples_hash, tokenize_row
from loragen.core.errors import DataError, UsageError
from loragen.core.lora.packing import Batch, Cost, answers_of, packed, packing_cost, padded
from loragen.core.lora.settings import validation_hash
from loragen.core.run.directory import DatasetRecord

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """A dataset ready to train on."""

    training: Sequence[Example]
    validation: Sequence[Example]
    training_rows: Sequence[Row]
    """The rows that `training` was made of."""
    record: DatasetRecord


def load_rows(config: LoraTrainConfig, name: str, source: Source, tokenizer: Any) -> Rows:
    """The tokenised rows of a source, with the held-out ones apart.

    Raises UsageError for what is missing, DataError for bad rows (unless they are to be skipped)
    or where none are left to train on.
    """
    rows, examples, too_long = _tokenised(source, config, tokenizer)
    training, held = held_out(len(rows), config.data.val_ratio, config.seed)
    if not training:
        raise DataError(f"{source}: data.val_ratio leaves no rows to train on ({len(rows)} in all)")
    validation = [examples[index] for index in held]
    if config.data.validation:
        _, validation, _ = _tokenised(parsed_source(config.data.validation), config, tokenizer)
    record = DatasetRecord(
        name=name,
        path=location(source),
        sha256=content_hash(source),
        rows=len(rows),
        tokens=examples_hash(examples),
        too_long=too_long,
        validation=validation_hash(config),
    )
    return Rows(
        [examples[index] for index in training],
        validation,
        [rows[index] for index in training],
        record,
    )


def fitting(
    tokenizer: Any, rows: Sequence[Row], max_length: int
) -> tuple[list[Row], list[Example], list[BadRow], int]:
    """The rows whose answer fits, their tokens, the others, and how many prompts had to be cut."""
    kept, examples, too_long, cut = [], [], [], 0
    for row in rows:
        try:
            parts = tokenize_row(tokenizer, row, max_length)
        except DataError as error:
            too_long.append(BadRow(row.line, str(error)))
            continue
        kept.append(row)
        examples.append(parts.example)
        cut += bool(parts.cut)
    return kept, examples, too_long, cut


@dataclass(frozen=True)
class Batching:
    """How examples become batches."""

    batch_size: int
    """Rows of a whole optimizer step."""
    seed: int
    pad_id: int
    cost: Cost | None
    """Of a packed batch; None for a base model that cannot be packed."""
    parts: int = 1
    rank: int = 0
    ranks: int = 1

    def batch(self, examples: Sequence[Example], step_answers: int | None = None) -> Batch:
        if self.cost is None:
            return padded(examples, self.pad_id, step_answers)
        return packed(examples, self.pad_id, self.cost, step_answers)


class MicroBatches(Dataset[Batch]):
    """Item k is accumulation round ``k % parts`` of step ``k // parts``, for one device."""

    def __init__(self, examples: Sequence[Example], batching: Batching) -> None:
        self.examples, self.batching = examples, batching

    def __getitem__(self, k: int) -> Batch:
        how = self.batching
        step, part = divmod(k, how.parts)
        batch = batch_indices(len(self.examples), how.batch_size, how.seed, step)
        answers = answers_of([self.examples[index] for index in batch])
        mine = micro_batch(batch, how.rank, how.ranks, part, how.parts)
        return how.batch([self.examples[index] for index in mine], answers)


class LoraDataModule(LightningDataModule):
    """Training batches from the step the trainer stands at, and the held-out rows."""

    def __init__(
        self,
        rows: Rows,
        *,
        batch_size: int,
        max_steps: int,
        seed: int,
        pad_id: int,
        packing: bool = True,
        workers: int = 0,
        limit: float | None = None,
    ) -> None:
        """`limit`: train on so many micro-batches of the whole run (int), or that share (float)."""
        super().__init__()
        self.rows, self.batch_size, self.max_steps = rows, batch_size, max_steps
        self.seed, self.pad_id, self.packing, self.workers = seed, pad_id, packing, workers
        self.limit = limit

    def check_shared(self, ranks: int, parts: int) -> None:
        """Before the training begins: with `devices: auto` nobody has known how many there are.

        Raises UsageError where `ranks` devices and `parts` accumulation rounds cannot share a
        step equally, or `limit` leaves no whole step.
        """
        if self.batch_size % (parts * ranks):
            raise UsageError(
                f"training.batch_size {self.batch_size} must be a multiple of {ranks} devices x "
                f"{parts} accumulate_grad_batches: it counts the rows of a whole step"
            )
        if not self._last_step(parts):
            raise UsageError(f"trainer.limit_train_batches {self.limit} leaves no whole step")

    @cached_property
    def batching(self) -> Batching:
        """Known once the model is on its device, where it is asked whether it can be packed."""
        assert self.trainer is not None
        parts, ranks = self.trainer.accumulate_grad_batches, self.trainer.world_size
        return Batching(
            self.batch_size,
            self.seed,
            self.pad_id,
            self._cost(self.batch_size // (parts * ranks)) if self.packing else None,
            parts=parts,
            rank=self.trainer.global_rank,
            ranks=ranks,
        )

    def _cost(self, rows: int) -> Cost | None:
        assert self.trainer is not None
        model = self.trainer.lightning_module.model
        return packing_cost(model, self.rows.training, self.pad_id, rows)

    def train_dataloader(self) -> DataLoader[Batch]:
        assert self.trainer is not None
        parts = self.batching.parts
        remaining = range(self.trainer.global_step * parts, self._last_step(parts) * parts)
        return DataLoader(
            MicroBatches(self.rows.training, self.batching),
            batch_size=None,
            sampler=remaining,
            num_workers=self.workers,
            worker_init_fn=leave_interrupts_to_us,
        )

    def _last_step(self, parts: int) -> int:
        """Where `limit` ends the run: after whole steps."""
        if self.limit is None:
            return self.max_steps
        share = isinstance(self.limit, float)
        batches = int(self.limit * self.max_steps * parts) if share else int(self.limit)
        return min(self.max_steps, batches // parts)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Every rank sees all held-out rows, so that every rank takes the same decisions."""
        rows = self.rows.validation
        starts = range(0, len(rows), self.batch_size)
        batches = [self.batching.batch(rows[at : at + self.batch_size]) for at in starts]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]  # a list is map-style


def leave_interrupts_to_us(worker: int) -> None:  # noqa: ARG001  # the loader's signature
    """Ctrl+C reaches every process of a terminal; a step that is to be finished needs its batch."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _tokenised(
    source: Source, config: LoraTrainConfig, tokenizer: Any
) -> tuple[list[Row], list[Example], list[int]]:
    """The rows, their tokens, and the lines of skipped rows whose answer was too long."""
    skip = config.data.skip_bad_rows
    found = read_rows(source, skip)
    rows, examples, too_long, cut = fitting(tokenizer, found, config.data.max_length)
    refuse_bad(source, too_long, len(rows), skip)
    warn_of_bad(source, too_long, len(rows))
    if cut:
        log.warning(
            "%s: %d of %d rows are longer than data.max_length %d and lose the start of their "
            "prompt; `loragen data preview` shows it",
            source,
            cut,
            len(rows),
            config.data.max_length,
        )
    return rows, examples, [row.line for row in too_long]
