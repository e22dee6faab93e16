"""LoRA training as a LightningModule: the loss, the optimizer, and what a checkpoint keeps.

What happens around the steps of LoRA training: metrics, checkpoints, the end of it.
"""

import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from loragen.core.config.schema import CheckpointsSection
from loragen.core.lora.packing import Batch, answer_logits, answer_losses, rows_right, token_losses
from loragen.core.lora.provenance import Provenance, tracked_step, tracking_file, write_mappings
from loragen.core.progress import Step
from loragen.core.protocols import Schedule
from loragen.core.run.directory import CHECKPOINTS, LAST_CHECKPOINT, LoraManifest, checkpoint_name
from loragen.core.run.loggers import StepLog
from loragen.core.run.loop import (
    Interruption,
    RunSession,
    StepCallback,
    check_loss,
    check_weights,
    step_schedule,
)


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


class StepMetrics(StepCallback):
    """Logs, reports and, where wanted, tracks every optimizer step."""

    def __init__(self, session: RunSession, provenance: Provenance | None) -> None:
        self.session, self.provenance = session, provenance
        self._began = 0.0
        self._tracked: StepLog | None = None

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        self._began = time.perf_counter()
        if self.provenance and trainer.is_global_zero:
            file = tracking_file(self.session.directory, _manifest(self.session).dataset.name)
            self._tracked = StepLog(file, trainer.global_step)

    def on_step(self, trainer: Trainer, pl_module: Any, batch: Batch) -> None:
        step = trainer.global_step
        loss = float(trainer.strategy.reduce(torch.as_tensor(pl_module.step_loss), reduce_op="sum"))
        now = time.perf_counter()
        speed, self._began = batch.step_answers / (now - self._began), now
        rate = pl_module.schedule(step, pl_module.max_steps)
        metrics = {
            "train/loss": loss,
            "train/lr": rate.learning_rate,
            "train/stage": float(rate.stage),
            "train/tokens_per_second": speed,
        }
        self.session.log_metrics(metrics, step)
        self.session.report(
            Step(step, pl_module.max_steps, rate.stage, loss, speed, "answer tokens/s")
        )
        check_loss("train/loss", loss, step, self.session.directory)
        _manifest(self.session).final_loss = loss
        if self.provenance and self._tracked:
            self._tracked.append(tracked_step(self.provenance, step, rate, loss))

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        found = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        self.session.log_metrics(found, trainer.global_step)
        check_loss("val/loss", found["val/loss"], trainer.global_step, self.session.directory)

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Also where nothing was left to train."""
        if trainer.is_global_zero:
            self._write_mappings(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """However the run ends, what there is can be traced. (No teardown follows an error.)"""
        if self._tracked:
            self._write_mappings(pl_module)

    def _write_mappings(self, pl_module: Any) -> None:
        if self.provenance:
            manifest = _manifest(self.session)
            rates = {s: pl_module.schedule(s, pl_module.max_steps) for s in manifest.steps}
            write_mappings(self.session.directory, manifest.dataset.name, self.provenance, rates)


class StepCheckpoints(StepCallback):
    """Keeps steps `first`, `first + every`, ... and the last one; renews last.ckpt in between, for
    as long as there is no newer checkpoint that a killed run could go on from.

    A step that validates is saved after it, when early stopping has counted what it saw.
    """

    def __init__(
        self,
        session: RunSession,
        settings: CheckpointsSection,
        val_every: int | None,
        interruption: Interruption,
    ) -> None:
        self.session, self.settings = session, settings
        self.val_every, self.interruption = val_every, interruption

    def on_step(self, trainer: Trainer, pl_module: Any, batch: Batch) -> None:
        if not self.val_every or trainer.global_step % self.val_every:
            self._after(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._after(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        self.interruption.listen()

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """A run that stopped early has its last step all the same, and needs no last.ckpt. So has
        one that was killed after its last step, and has nothing left to train."""
        self._keep(trainer, pl_module, self.settings.optimizer != "none")
        if trainer.is_global_zero:
            self._last.unlink(missing_ok=True)

    def _after(self, trainer: Trainer, pl_module: Any) -> None:
        step, settings = trainer.global_step, self.settings
        final = step == trainer.max_steps or trainer.should_stop
        resumable = settings.carries_optimizer(final)
        if settings.keeps(step, final):
            self._keep(trainer, pl_module, resumable)
        stops = self.interruption.requested_on_any(trainer)
        covered = resumable and step in _manifest(self.session).steps
        if (stops or step % settings.last_every == 0) and not covered:
            self._save(trainer, pl_module, self._last, with_optimizer=True)
        if stops:
            raise self.interruption.error_after(
                step, trainer.max_steps, f"lora train --resume {self.session.directory}"
            )

    @property
    def _last(self) -> Path:
        return self.session.directory / LAST_CHECKPOINT

    def _keep(self, trainer: Trainer, pl_module: Any, with_optimizer: bool) -> None:
        step, steps = trainer.global_step, _manifest(self.session).steps
        if step in steps:
            return
        file = self.session.directory / CHECKPOINTS / checkpoint_name(step)
        self._save(trainer, pl_module, file, with_optimizer)
        steps.append(step)
        if with_optimizer and trainer.is_global_zero:
            self._last.unlink(missing_ok=True)

    def _save(self, trainer: Trainer, pl_module: Any, file: Path, with_optimizer: bool) -> None:
        check_weights(pl_module.state_dict(), trainer.global_step, self.session.directory)
        pl_module.saves_optimizer = with_optimizer
        trainer.save_checkpoint(file, weights_only=False)  # on all ranks: it has a barrier


def _manifest(session: RunSession) -> LoraManifest:
    assert isinstance(session.manifest, LoraManifest)
    return session.manifest
