"""Tokenised rows as micro-batches that depend on (seed, step, rank, part) alone."""

from collections.abc import Sequence

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from loragen.core.data.batches import batch_indices, micro_batch
from loragen.core.data.tokenize import Batch, Example, collate


class MicroBatches(Dataset[Batch]):
    """Item k is accumulation round ``k % parts`` of step ``k // parts``, for one device."""

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        seed: int,
        pad_id: int,
        parts: int = 1,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.examples, self.batch_size, self.seed, self.pad_id = examples, batch_size, seed, pad_id
        self.parts, self.rank, self.ranks = parts, rank, ranks

    def __getitem__(self, k: int) -> Batch:
        step, part = divmod(k, self.parts)
        batch = batch_indices(len(self.examples), self.batch_size, self.seed, step)
        answers = sum(self.examples[index].answer for index in batch)
        mine = micro_batch(batch, self.rank, self.ranks, part, self.parts)
        return collate([self.examples[index] for index in mine], self.pad_id, answers)


class LoraDataModule(LightningDataModule):
    """Training batches from the step the trainer stands at, and the held-out rows."""

    def __init__(
        self,
        training: Sequence[Example],
        validation: Sequence[Example],
        *,
        batch_size: int,
        max_steps: int,
        seed: int,
        pad_id: int,
    ) -> None:
        super().__init__()
        self.training, self.validation = training, validation
        self.batch_size, self.max_steps, self.seed, self.pad = batch_size, max_steps, seed, pad_id

    def train_dataloader(self) -> DataLoader[Batch]:
        assert self.trainer is not None
        parts = self.trainer.accumulate_grad_batches
        batches = MicroBatches(
            self.training,
            self.batch_size,
            self.seed,
            self.pad,
            parts,
            self.trainer.global_rank,
            self.trainer.world_size,
        )
        first = self.trainer.global_step * parts
        return DataLoader(batches, batch_size=None, sampler=range(first, self.max_steps * parts))

    def val_dataloader(self) -> DataLoader[Batch]:
        """Every rank sees all held-out rows, so that every rank takes the same decisions."""
        size = self.batch_size
        batches = [
            collate(self.validation[first : first + size], self.pad)
            for first in range(0, len(self.validation), size)
        ]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]  # a list is map-style
