"""LoRA training as a LightningModule, and the callbacks that log its steps and save checkpoints."""

import logging
import time
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from loragen.core.config.schema import CheckpointsSection
from loragen.core.lora.packing import Batch, answer_logits, answer_losses, rows_right, token_losses
from loragen.core.lora.provenance import Provenance, tracked_step, tracking_file, write_mappings
from loragen.core.progress import Step
from loragen.core.protocols import Schedule
from loragen.core.run.directory import CHECKPOINTS, LoraManifest, checkpoint_name
from loragen.core.run.loggers import StepLog
from loragen.core.run.loop import (
    CheckpointCallback,
    Interruption,
    RunSession,
    StepCallback,
    check_loss,
    step_schedule,
)
from loragen.core.run.resume import ResumableModule

log = logging.getLogger(__name__)

UNMOVED = 1e-6
"""The share of the loss below which a change of it is rounding."""


class LoraModule(ResumableModule):
    """Trains the adapter of a `PeftModel`.

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
    ) -> None:
        super().__init__()
        self.model = model
        self.schedule, self.max_steps, self.weight_decay = schedule, max_steps, weight_decay
        self.fused = fused
        self.saves_optimizer = True
        """Whether the next checkpoint holds the optimizer's state, which a resumed run needs."""
        self.step_loss: Tensor | float = 0.0
        """This process's share of the mean loss (nats per answer token) of the current step."""
        self._adapter = {n: p for n, p in model.named_parameters() if "lora_" in n}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the share of these rows in the mean loss of the step.

        The loss is normalised by the answer tokens of the *whole* step. Lightning then averages
        over processes and accumulation rounds, which the factor undoes, so that the gradient of a
        step does not depend on how it is split.
        """
        share = answer_losses(self.model, batch).sum() / batch.step_label_tokens
        num_accumulation = self.trainer.accumulate_grad_batches
        before = 0.0 if batch_idx % num_accumulation == 0 else self.step_loss
        self.step_loss = before + share.detach()
        return share * num_accumulation * self.trainer.world_size

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        logits, tokens = answer_logits(self.model, batch)
        losses, right = token_losses(logits, tokens), rows_right(logits, batch)
        self.log("val/loss", losses.mean(), batch_size=len(losses), on_epoch=True, logger=False)
        self.log(
            "val/accuracy", right.float().mean(), batch_size=len(right), on_epoch=True, logger=False
        )

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(
            [p for p in self._adapter.values() if p.requires_grad],
            lr=1.0,
            weight_decay=self.weight_decay,
            fused=self.fused,
        )
        self.load_optimizer(optimizer)

        def learning_rate(step: int) -> float:
            last = min(step, self.max_steps)  # LambdaLR also asks for the step after the last
            return self.schedule(last, self.max_steps).learning_rate

        schedule = step_schedule(optimizer, learning_rate, self.completed_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Tensor]:  # type: ignore[override]  # torch overloads it
        """Returns the adapter's tensors alone, a frozen A too. Collecting the state of the whole
        model and leaving most of it out would take longer than writing the file."""
        return {f"model.{name}": p.detach() for name, p in self._adapter.items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if not self.saves_optimizer:
            checkpoint["optimizer_states"] = []


class StepMetrics(StepCallback):
    """Logs and reports every optimizer step and, with `track_batches`, writes tracking/."""

    def __init__(
        self, session: RunSession, manifest: LoraManifest, provenance: Provenance | None
    ) -> None:
        self.session, self.manifest, self.provenance = session, manifest, provenance
        self._began = 0.0
        self._tracked: StepLog | None = None
        self._batch: Batch | None = None

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        self._began = time.perf_counter()
        if self.provenance and trainer.is_global_zero:
            file = tracking_file(self.session.directory, self.manifest.dataset.name)
            self._tracked = StepLog(file, trainer.global_step)

    def on_step(self, trainer: Trainer, pl_module: Any, batch: Batch) -> None:
        step, self._batch = trainer.global_step, batch
        loss = float(trainer.strategy.reduce(torch.as_tensor(pl_module.step_loss), reduce_op="sum"))
        now = time.perf_counter()
        speed, self._began = batch.step_label_tokens / (now - self._began), now
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
        self.manifest.final_loss = loss
        if self.provenance and self._tracked:
            self._tracked.append(tracked_step(self.provenance, step, rate, loss))

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        found = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        self.session.log_metrics(found, trainer.global_step)
        check_loss("val/loss", found["val/loss"], trainer.global_step, self.session.directory)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Warns if the training has not changed the loss of the last rows."""
        if self._batch is None or not trainer.is_global_zero:
            return
        model, training = pl_module.model, pl_module.model.training
        model.eval()
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            with_it = float(answer_losses(model, self._batch).mean())
            with model.disable_adapter():
                without = float(answer_losses(model, self._batch).mean())
        model.train(training)
        if abs(with_it - without) <= UNMOVED * without:
            log.warning(
                "%s: nothing was learned: the loss is %.4f with the adapter and without it; the "
                "learning rate (%g) may be too low",
                self.session.directory,
                without,
                pl_module.schedule(trainer.global_step, pl_module.max_steps).learning_rate,
            )

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Lightning calls this even if no step was left to train."""
        if trainer.is_global_zero:
            self._write_mappings(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Lightning does not call `teardown` after an error."""
        if self._tracked:
            self._write_mappings(pl_module)

    def _write_mappings(self, pl_module: Any) -> None:
        if self.provenance:
            steps = self.manifest.steps
            rates = {step: pl_module.schedule(step, pl_module.max_steps) for step in steps}
            name = self.manifest.dataset.name
            write_mappings(self.session.directory, name, self.provenance, rates)


class StepCheckpoints(CheckpointCallback):
    """Saves a checkpoint of step `first_step`, of every `every` steps after it, and of the last.

    last.ckpt is renewed in between, as long as there is no newer checkpoint from which a killed run
    could resume. A step with a validation is saved after it, so that the checkpoint holds the state
    of early stopping.
    """

    command = "lora train"

    def __init__(
        self,
        session: RunSession,
        interruption: Interruption,
        manifest: LoraManifest,
        settings: CheckpointsSection,
        val_every: int | None,
    ) -> None:
        """Validation takes place every `val_every` steps; None: there is none."""
        super().__init__(session, interruption, settings.last_every)
        self.manifest, self.settings, self.val_every = manifest, settings, val_every

    def on_step(self, trainer: Trainer, pl_module: Any, batch: Batch) -> None:
        if not self.val_every or trainer.global_step % self.val_every:
            self._save_if_due(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._save_if_due(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Keeps the last step of a run that stopped early, or that was killed after it, and removes
        last.ckpt."""
        self._keep(trainer, self.settings.optimizer != "none")
        if trainer.is_global_zero:
            self.last_file.unlink(missing_ok=True)

    def _save_if_due(self, trainer: Trainer) -> None:
        step, settings = trainer.global_step, self.settings
        final = step == trainer.max_steps or trainer.should_stop
        resumable = settings.carries_optimizer(final)
        if settings.keeps(step, final):
            self._keep(trainer, resumable)
        self.end_step(trainer, is_saved=resumable and step in self.manifest.steps)

    def _keep(self, trainer: Trainer, with_optimizer: bool) -> None:
        step, steps = trainer.global_step, self.manifest.steps
        if step in steps:
            return
        module: Any = trainer.lightning_module
        module.saves_optimizer = with_optimizer
        self.save(trainer, self.session.directory / CHECKPOINTS / checkpoint_name(step))
        steps.append(step)
        if with_optimizer and trainer.is_global_zero:
            self.last_file.unlink(missing_ok=True)

    def save_last(self, trainer: Trainer) -> None:
        module: Any = trainer.lightning_module
        module.saves_optimizer = True
        self.save(trainer, self.last_file)
