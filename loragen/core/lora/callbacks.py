"""What happens around the steps of LoRA training: metrics, checkpoints, the end of it."""

import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from loragen.core.config.lora_schema import Checkpoints
from loragen.core.divergence import check_loss, check_weights
from loragen.core.interrupt import Interruption
from loragen.core.lora.batch import Batch
from loragen.core.lora.provenance import (
    Provenance,
    tracked_step,
    tracking_file,
    write_mappings,
)
from loragen.core.manifests import LoraManifest
from loragen.core.metrics_log import StepLog
from loragen.core.progress import Step
from loragen.core.runs import CHECKPOINTS, LAST_CHECKPOINT, checkpoint_name
from loragen.core.session import RunSession
from loragen.core.steps import StepCallback


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
        settings: Checkpoints,
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
