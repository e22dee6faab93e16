"""LoRA training as a LightningModule: the loss, the optimizer, and what a checkpoint keeps."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from loragen.core.data.tokenize import Batch
from loragen.core.lora.loss import answer_losses
from loragen.core.protocols import Schedule


class LoraModule(LightningModule):
    """`model` is a PeftModel of which only the adapter trains.

    A checkpoint holds the adapter's tensors and what resuming needs, never the base.
    """

    strict_loading = False

    def __init__(
        self,
        model: Any,
        schedule: Schedule,
        *,
        max_steps: int,
        weight_decay: float,
        fused: bool = True,
        keeps_optimizer: Literal["all", "last", "none"] = "all",
    ) -> None:
        super().__init__()
        self.model = model
        self.schedule, self.max_steps, self.weight_decay = schedule, max_steps, weight_decay
        self.fused, self.keeps_optimizer = fused, keeps_optimizer
        self.step_loss: Tensor | float = 0.0
        """Mean loss per answer token over this device's part of the current step."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The share of the step's mean loss that these rows make up.

        Normalised by the answer tokens of the *whole* step. Lightning then averages over devices
        and accumulation rounds, which the factor takes back: any split gives the same gradient.
        """
        share = answer_losses(self.model, batch).sum() / batch.step_answers
        parts = self.trainer.accumulate_grad_batches
        self.step_loss = (0.0 if batch_idx % parts == 0 else self.step_loss) + share.detach()
        return share * parts * self.trainer.world_size

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        losses = answer_losses(self.model, batch)
        self.log("val/loss", losses.mean(), batch_size=len(losses), on_epoch=True, logger=False)

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=1.0, weight_decay=self.weight_decay, fused=self.fused
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": step_schedule(optimizer, self._rate), "interval": "step"},
        }

    def _rate(self, step: int) -> float:
        return self.schedule(step, self.max_steps).learning_rate

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in state.items() if "lora_" in k}
        last = checkpoint["global_step"] >= self.max_steps
        if self.keeps_optimizer == "none" or (self.keeps_optimizer == "last" and not last):
            checkpoint["optimizer_states"] = []


def step_schedule(
    optimizer: torch.optim.Optimizer, rate: Callable[[int], float]
) -> torch.optim.lr_scheduler.LambdaLR:
    """`rate(step)`, counted from 1, as the learning rate of an optimizer built with lr=1."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: rate(done + 1))
