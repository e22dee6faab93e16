"""Generator training as a LightningModule: reconstruct adapters from prompts."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from loragen.core.config.schema import GenTraining
from loragen.core.generator.normalization import Normalization
from loragen.core.generator.optimization import StepPlan, optimizer_for
from loragen.core.generator.pairs import PairBatch
from loragen.core.steps import step_schedule

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
        plan: StepPlan,
        normalization: Normalization,
        mask: Tensor,
        training: GenTraining,
        *,
        first_step: int = 0,
        optimizer_state: dict[str, Any] | None = None,
    ) -> None:
        """`mask` is the layout's: ``[tokens, token_dim]`` bool. `first_step` steps are done already
        and have left `optimizer_state`."""
        super().__init__()
        self.network = network
        self.plan, self.training_options = plan, training
        self.first_step, self._optimizer_state = first_step, optimizer_state
        # Not in checkpoints: they are as large as an adapter each and the same in all of them.
        self.register_buffer("mean", normalization.mean, persistent=False)
        self.register_buffer("scale", normalization.scale, persistent=False)
        self.register_buffer("valid", mask, persistent=False)
        self.step_metrics: dict[str, Any] = {}
        """Of this device's part of the last training step: the mean of its micro-batches."""

    @property
    def normalization(self) -> Normalization:
        return Normalization(self.mean, self.scale)

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        noisy = _with_noise(batch.condition, self.training_options.condition_noise)
        loss, metrics = self._losses(batch._replace(condition=noisy))
        parts = self.trainer.accumulate_grad_batches
        for name, value in metrics.items():
            before = 0.0 if batch_idx % parts == 0 else self.step_metrics[f"train/{name}"]
            self.step_metrics[f"train/{name}"] = before + value / parts
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
        optimizer = optimizer_for(self.network, self.training_options)
        if self._optimizer_state:
            optimizer.load_state_dict(self._optimizer_state)
        schedule = step_schedule(
            optimizer, lambda step: self.plan.rate(step).learning_rate, self.first_step
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def _with_noise(condition: Tensor, share: float) -> Tensor:
    """Gaussian noise of `share` times the condition's own standard deviation."""
    return condition + share * condition.std() * torch.randn_like(condition) if share else condition
