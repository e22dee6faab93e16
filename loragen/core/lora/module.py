"""LoRA training as a LightningModule: the loss, the optimizer, and what a checkpoint keeps."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from loragen.core.lora.batch import Batch
from loragen.core.lora.loss import answer_logits, answer_losses, rows_right, token_losses
from loragen.core.protocols import Schedule
from loragen.core.steps import step_schedule


class LoraModule(LightningModule):
    """`model` is a PeftModel of which only the adapter trains.

    A checkpoint holds the adapter's tensors and what resuming needs, never the base.
    """

    def __init__(
        self,
        model: Any,
        schedule: Schedule,
        *,
        max_steps: int,
        weight_decay: float,
        fused: bool = True,
        optimizer_state: dict[str, Any] | None = None,
        first_step: int = 0,
    ) -> None:
        """`first_step` steps are done already and have left `optimizer_state`."""
        super().__init__()
        self.model = model
        self.schedule, self.max_steps, self.weight_decay = schedule, max_steps, weight_decay
        self.fused, self.first_step = fused, first_step
        self.saves_optimizer = True
        """Whether the next checkpoint carries the optimizer's state, which resuming needs."""
        self.step_loss: Tensor | float = 0.0
        """Mean loss per answer token over this device's part of the current step."""
        self._optimizer_state = optimizer_state
        self._trained = {n: p for n, p in model.named_parameters() if p.requires_grad}

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
        logits, tokens = answer_logits(self.model, batch)
        losses, right = token_losses(logits, tokens), rows_right(logits, batch)
        self.log("val/loss", losses.mean(), batch_size=len(losses), on_epoch=True, logger=False)
        self.log(
            "val/accuracy", right.float().mean(), batch_size=len(right), on_epoch=True, logger=False
        )

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(
            self._trained.values(), lr=1.0, weight_decay=self.weight_decay, fused=self.fused
        )
        if self._optimizer_state:
            optimizer.load_state_dict(self._optimizer_state)
        schedule = step_schedule(optimizer, self._rate, self.first_step)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def _rate(self, step: int) -> float:
        """LambdaLR also asks for the step after the last."""
        return self.schedule(min(step, self.max_steps), self.max_steps).learning_rate

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Tensor]:  # type: ignore[override]  # ours
        """The adapter's tensors alone. (Walking through a whole model to leave most of it out
        would cost more than writing the file.)"""
        return {f"model.{name}": p.detach() for name, p in self._trained.items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if not self.saves_optimizer:
            checkpoint["optimizer_states"] = []
