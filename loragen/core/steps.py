"""One walk through optimizer steps, as every training takes it: seeds, rates, what happens once a
step. All of it is a function of (seed, step), so that a run can go on from any step."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class StepSeeds(Callback):
    """Dropout and noise as a pure function of (seed, micro-batch, rank), like the batches."""

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


class StepCallback(Callback, ABC):
    """Calls `on_step` once per optimizer step: with accumulation, several batches end at one."""

    _done = 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._done = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > self._done:
            self._done = trainer.global_step
            self.on_step(trainer, pl_module, batch)

    @abstractmethod
    def on_step(self, trainer: Trainer, pl_module: Any, batch: Any) -> None: ...


def step_schedule(optimizer: Optimizer, rate: Callable[[int], float], done: int = 0) -> LambdaLR:
    """`rate(step)`, counted from 1, as the learning rate of an optimizer that has `done` steps
    behind it; a parameter group's own `factor` multiplies it."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = group.get("factor", 1.0)
    return LambdaLR(optimizer, lambda steps: rate(steps + 1), last_epoch=done - 1)
