"""What happens around the steps of LoRA training: seeds, checkpoints, metrics."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from loragen.core.data.tokenize import Batch
from loragen.core.progress import Step
from loragen.core.runs import CHECKPOINTS, LoraManifest, checkpoint_name
from loragen.core.session import RunSession


class StepSeeds(Callback):
    """Dropout as a pure function of (seed, micro-batch, rank), like the batches."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        parts = trainer.accumulate_grad_batches
        k = trainer.global_step * parts + batch_idx % parts
        torch.manual_seed((self.seed * 1_000_003 + k) * 4099 + trainer.global_rank)


class StepCheckpoints(Callback):
    """Keeps steps `first`, `first + every`, ... and the last one."""

    def __init__(self, session: RunSession, first: int, every: int) -> None:
        self.session, self.first, self.every = session, first, every
        self.saved: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        step = trainer.global_step
        due = step >= self.first and (step - self.first) % self.every == 0
        if due or step == trainer.max_steps:
            self._save(trainer, step)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """A run that stopped early has its last step all the same."""
        self._save(trainer, trainer.global_step)

    def _save(self, trainer: Trainer, step: int) -> None:
        if step in self.saved:  # accumulation: several batches end at one step
            return
        file = self.session.directory / CHECKPOINTS / checkpoint_name(step)
        trainer.save_checkpoint(file, weights_only=False)  # on all ranks: it has a barrier
        self.saved.append(step)
        assert isinstance(self.session.manifest, LoraManifest)
        self.session.manifest.steps.append(step)


class StepMetrics(Callback):
    """Logs and reports every optimizer step."""

    def __init__(self, session: RunSession) -> None:
        self.session = session
        self._step = 0
        self._began = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._step, self._began = trainer.global_step, time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        step = trainer.global_step
        if step == self._step:
            return
        loss = float(trainer.strategy.reduce(torch.as_tensor(pl_module.step_loss), reduce_op="sum"))
        now = time.perf_counter()
        rate = batch.step_answers / (now - self._began)
        self._step, self._began = step, now
        stage = pl_module.schedule(step, pl_module.max_steps).stage
        metrics = {
            "train/loss": loss,
            "train/lr": pl_module.schedule(step, pl_module.max_steps).learning_rate,
            "train/stage": float(stage),
            "train/tokens_per_second": rate,
        }
        self.session.log_metrics(metrics, step)
        self.session.report(Step(step, pl_module.max_steps, stage, loss, rate, "answer tokens/s"))
        assert isinstance(self.session.manifest, LoraManifest)
        self.session.manifest.final_loss = loss

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.session.log_metrics(
            {"val/loss": float(trainer.callback_metrics["val/loss"])}, trainer.global_step
        )
