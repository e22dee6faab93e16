"""The training of a generator as a LightningModule: weights, losses, optimizer."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from loragen.core.config.schema import GenTrainingSection
from loragen.core.generator.network import Network
from loragen.core.learning.arrays import conditions
from loragen.core.learning.data import PairBatch
from loragen.core.learning.plan import Phases
from loragen.core.run.loop import step_schedule
from loragen.core.run.resume import ResumableModule

VALIDATION = ("val", "val_unseen")
"""Held-out prompt texts of the training datasets, and held-out datasets."""


class GeneratorModule(ResumableModule):
    """Trains a network, and its encoder unless that is frozen, through the phases.

    The loss of a step is that of its phase; the last phase's objective validates all of them.
    """

    def __init__(
        self,
        network: Network,
        phases: Phases,
        training: GenTrainingSection,
        encoder: Any = None,
    ) -> None:
        """`encoder` is None if it is frozen."""
        super().__init__()
        self.network = network
        self.encoder = encoder.train() if encoder else None
        # The phases are not registered as submodules: their objectives hold nothing that training
        # changes, and the base may be large.
        self.phases, self.training_options = phases, training
        self.averaged: AveragedModel | None = None
        if training.ema_decay is not None:
            average = get_ema_multi_avg_fn(training.ema_decay)  # type: ignore[no-untyped-call]  # untyped in torch
            averaged = AveragedModel(self.trainable_modules, multi_avg_fn=average)
            self.averaged = averaged.requires_grad_(False)
        self._finalized: int | None = None
        self.step_metrics: dict[str, Any] = {}
        """The metrics of the last training step, averaged over this process's micro-batches."""

    @property
    def trainable_modules(self) -> nn.ModuleDict:
        """`network` and, unless it is frozen, `encoder`."""
        parts = {"network": self.network, "encoder": self.encoder}
        return nn.ModuleDict({name: part for name, part in parts.items() if part is not None})

    @property
    def eval_modules(self) -> nn.ModuleDict:
        """The modules that are validated and saved: the averaged ones if `ema_decay` is set."""
        found = self.averaged.module if self.averaged else self.trainable_modules
        assert isinstance(found, nn.ModuleDict)
        return found

    def on_fit_start(self) -> None:
        for phase in self.phases:
            phase.objective.to(self.device)

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        phase, _ = self.phases.at(self.trainer.global_step + 1)
        batch = _encoded(batch, self.encoder)
        batch = batch._replace(condition=self._with_noise(batch.condition))
        if batch.support is not None:
            noisy = self._with_noise(batch.support.condition)
            batch = batch._replace(support=batch.support._replace(condition=noisy))
        loss, metrics = phase.objective.loss(self.network, batch)
        accumulation = self.trainer.accumulate_grad_batches
        before = {} if batch_idx % accumulation == 0 else self.step_metrics
        self.step_metrics = {
            f"train/{name}": before.get(f"train/{name}", 0.0) + value / accumulation
            for name, value in metrics.items()
        }
        return loss

    def _with_noise(self, condition: Tensor) -> Tensor:
        """Adds Gaussian noise, in units of the standard deviation of each dimension."""
        share = self.training_options.condition_noise
        if not share:
            return condition
        return condition + share * self.network.condition_spread * torch.randn_like(condition)

    def finalize(self) -> None:
        """Calls `Objective.finalize` on `eval_modules`, once per step, before they are validated or
        saved."""
        step = self.trainer.global_step
        if self._finalized != step:
            self.phases.at(step)[0].objective.finalize(self.eval_modules["network"])
            self._finalized = step

    def on_validation_start(self) -> None:
        self.finalize()

    def validation_step(self, batch: PairBatch, batch_idx: int, dataloader_idx: int) -> None:
        batch = _encoded(batch, self.eval_modules["encoder"] if self.encoder else None)
        metrics = self.phases.last.objective.validate(self.eval_modules["network"], batch)
        for name, value in metrics.items():
            self.log(
                f"{VALIDATION[dataloader_idx]}/{name}",
                value,
                batch_size=len(batch.tokens),
                add_dataloader_idx=False,
                logger=False,
                sync_dist=True,
            )

    def configure_optimizers(self) -> Any:
        # Lightning does not clip the gradients of a fused optimizer in mixed precision.
        fused = not (self.trainer.gradient_clip_val and "mixed" in str(self.trainer.precision))
        optimizer = new_optimizer(self.trainable_modules, self.training_options, fused)
        self.load_optimizer(optimizer)
        schedule = step_schedule(
            optimizer, lambda step: self.phases.rate(step).learning_rate, self.completed_steps
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def _encoded(batch: PairBatch, encoder: Any) -> PairBatch:
    """Returns the batch with its texts encoded by the trainable encoder; unchanged if the encoder
    is frozen (None), because its embeddings are precomputed."""
    if encoder is None:
        return batch
    assert batch.texts is not None
    condition, mask = conditions(encoder, batch.texts)
    return batch._replace(condition=condition, mask=mask)


def new_optimizer(
    modules: nn.ModuleDict, options: GenTrainingSection, fused: bool = True
) -> torch.optim.Optimizer:
    """Returns the optimizer of the trainable modules: the network and, unless frozen, the encoder.

    `step_schedule` multiplies each group's `factor` into its learning rate. With `fused`, torch
    makes one pass over weights, gradients and moments instead of some ten.
    """
    groups: list[dict[str, Any]] = []
    for name, module in modules.items():
        factor = options.encoder_rate if name == "encoder" else 1.0
        parameters = [p for p in module.parameters() if p.requires_grad]
        matrices = [p for p in parameters if p.ndim >= 2]
        vectors = [p for p in parameters if p.ndim < 2]  # biases, norms: no weight decay
        groups.append({"params": matrices, "factor": factor})
        groups.append({"params": vectors, "factor": factor, "weight_decay": 0.0})
    shared: dict[str, Any] = {"lr": 1.0, "weight_decay": options.weight_decay, "fused": fused}
    match options.optimizer:
        case "adamw":
            return torch.optim.AdamW(groups, **shared)
        case "adam":
            return torch.optim.Adam(groups, **shared)
        case "sgd":
            return torch.optim.SGD(groups, momentum=options.momentum, **shared)
