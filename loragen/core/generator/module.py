"""Generator training as a LightningModule: reconstruct adapters from prompts."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from loragen.core.config.schema import GenTraining
from loragen.core.generator.normalization import Normalization
from loragen.core.generator.pairs import PairBatch
from loragen.core.lora.module import step_schedule
from loragen.core.protocols import Schedule

VALIDATION = ("val", "val_unseen")
"""Held-out prompt texts of the training datasets, and held-out datasets."""


class GeneratorModule(LightningModule):
    """`mse_weight · MSE + l1_weight · L1` on normalised tokens, under the mask."""

    mean: Tensor
    scale: Tensor
    valid: Tensor

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        normalization: Normalization,
        mask: Tensor,
        training: GenTraining,
        total_steps: int,
    ) -> None:
        """`mask` is the layout's: ``[tokens, token_dim]`` bool."""
        super().__init__()
        self.network = network
        self.schedule, self.training_options, self.total_steps = schedule, training, total_steps
        # Not in checkpoints: they are as large as an adapter each and the same in all of them.
        self.register_buffer("mean", normalization.mean, persistent=False)
        self.register_buffer("scale", normalization.scale, persistent=False)
        self.register_buffer("valid", mask, persistent=False)
        self.metrics: dict[str, float] = {}
        """Of the last training step (the mean of its micro-batches), and of the last validation."""

    @property
    def normalization(self) -> Normalization:
        return Normalization(self.mean, self.scale)

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        noisy = _with_noise(batch.condition, self.training_options.condition_noise)
        loss, metrics = self._losses(batch._replace(condition=noisy))
        parts = self.trainer.accumulate_grad_batches
        for name, value in metrics.items():
            before = 0.0 if batch_idx % parts == 0 else self.metrics[f"train/{name}"]
            self.metrics[f"train/{name}"] = before + value / parts
        return loss

    def validation_step(self, batch: PairBatch, batch_idx: int, dataloader_idx: int) -> None:
        _, metrics = self._losses(batch)
        for name, value in metrics.items():
            self.log(
                f"{VALIDATION[dataloader_idx]}/{name}",
                value,
                batch_size=len(batch.tokens),
                add_dataloader_idx=False,
                logger=False,
                sync_dist=True,
            )

    def _losses(self, batch: PairBatch) -> tuple[Tensor, dict[str, Any]]:
        target = self.normalization.normalize(batch.tokens)  # (B, L, C)
        error = self.network(batch.condition, batch.mask) - target
        error = torch.where(self.valid, error, 0.0)
        count = self.valid.sum() * len(error)
        mse, l1 = error.square().sum() / count, error.abs().sum() / count
        loss = self.training_options.mse_weight * mse + self.training_options.l1_weight * l1
        raw = error.detach() * self.scale  # in the adapter's own units
        norm = torch.linalg.vector_norm(torch.where(self.valid, batch.tokens, 0.0))
        metrics = {
            "loss": loss.detach(),
            "mse": mse.detach(),
            "l1": l1.detach(),
            "mae": raw.abs().sum() / count,
            "rmse": (raw.square().sum() / count).sqrt(),
            "relative_error": torch.linalg.vector_norm(raw) / norm,
        }
        return loss, metrics

    def configure_optimizers(self) -> Any:
        options = self.training_options
        optimizer = torch.optim.AdamW(
            _decayed_and_not(self.network), lr=1.0, weight_decay=options.weight_decay
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": step_schedule(optimizer, self._rate), "interval": "step"},
        }

    def _rate(self, step: int) -> float:
        return self.schedule(min(step, self.total_steps), self.total_steps).learning_rate


def _with_noise(condition: Tensor, share: float) -> Tensor:
    """Gaussian noise of `share` times the condition's own standard deviation."""
    return condition + share * condition.std() * torch.randn_like(condition) if share else condition


def _decayed_and_not(network: nn.Module) -> list[dict[str, Any]]:
    """Vectors (biases, norms) are not decayed, matrices are."""
    trained = [p for p in network.parameters() if p.requires_grad]
    vectors = {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}
    return [{"params": [p for p in trained if p.ndim >= 2]}, vectors]
