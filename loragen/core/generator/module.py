"""Generator training as a LightningModule: adapters from prompts, judged by the objectives."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from loragen.core.config.schema import GenTraining
from loragen.core.generator.network import Network
from loragen.core.generator.objectives import Behaviour, Losses, Reconstruction
from loragen.core.generator.pairs import PairBatch
from loragen.core.generator.phases import Objective, Phases
from loragen.core.lora.module import step_schedule
from loragen.core.protocols import Rate, Schedule

VALIDATION = ("val", "val_unseen")
"""Held-out prompt texts of the training datasets, and held-out datasets."""


class GeneratorModule(LightningModule):
    """A network on its way through the phases: what a batch holds says which objective it is for.

    Validation looks at what the phases do: the reconstruction of held-out pairs, and where the base
    is at hand, its loss and accuracy on held-out rows with the generated adapter in place.
    """

    def __init__(
        self,
        network: Network,
        schedules: Mapping[Objective, Schedule],
        phases: Phases,
        training: GenTraining,
        reconstruction: Reconstruction,
        behaviour: Behaviour | None = None,
        reconstruction_weight: float = 0.0,
    ) -> None:
        """`reconstruction_weight`: its share beside the behaviour."""
        super().__init__()
        self.network = network
        self.schedules, self.phases, self.training_options = schedules, phases, training
        # Not in checkpoints: they are the same in all of them, and the base may be large.
        self._objectives = reconstruction, behaviour
        self.reconstruction_weight = reconstruction_weight
        self.metrics: dict[str, float] = {}
        """Of the last training step (the mean of its micro-batches), and of the last validation."""

    @property
    def total_steps(self) -> int:
        return self.phases.total

    def on_fit_start(self) -> None:
        for objective in self._objectives:
            if objective:
                objective.to(self.device)

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        condition = self._with_noise(batch.condition)
        written = self.network(condition, batch.mask)  # (B, tokens, token_dim)
        loss, metrics = self._losses(written, batch)
        parts = self.trainer.accumulate_grad_batches
        for name, value in metrics.items():
            before = 0.0 if batch_idx % parts == 0 else self.metrics[f"train/{name}"]
            self.metrics[f"train/{name}"] = before + float(value) / parts
        return loss

    def _losses(self, written: Tensor, batch: PairBatch) -> Losses:
        reconstruction, behaviour = self._objectives
        if batch.rows is None:
            return reconstruction(written, batch.tokens, self.training_options.target_noise)
        assert behaviour is not None
        loss, metrics = behaviour(written, batch.rows)
        if self.reconstruction_weight:
            beside, more = reconstruction(written, batch.tokens)
            loss, metrics = loss + self.reconstruction_weight * beside, metrics | more
        return loss, {**metrics, "loss": loss.detach()}

    def _with_noise(self, condition: Tensor) -> Tensor:
        """Gaussian, in units of the spread of every dimension of the conditions."""
        share = self.training_options.condition_noise
        if not share:
            return condition
        return condition + share * self.network.condition_spread * torch.randn_like(condition)

    def validation_step(self, batch: PairBatch, batch_idx: int, dataloader_idx: int) -> None:
        reconstruction, behaviour = self._objectives
        written = self.network(batch.condition, batch.mask)
        metrics = reconstruction(written, batch.tokens)[1]
        metrics |= reconstruction.in_own_units(written, batch.tokens)
        if behaviour and batch.rows is not None:
            metrics["behaviour"], metrics["accuracy"] = behaviour.accuracy(written, batch.rows)
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
        options = self.training_options
        optimizer = torch.optim.AdamW(
            _decayed_and_not(self.network), lr=1.0, weight_decay=options.weight_decay
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": step_schedule(optimizer, self._rate), "interval": "step"},
        }

    def rate(self, step: int) -> Rate:
        """The rate of optimizer step `step`, counted from 1; stages are counted over all phases."""
        phase, within = self.phases.at(step)
        return self.schedules[phase.objective](within, phase.steps)

    def _rate(self, step: int) -> float:
        return self.rate(step).learning_rate


def _decayed_and_not(network: nn.Module) -> list[dict[str, Any]]:
    """Vectors (biases, norms) are not decayed, matrices are."""
    trained = [p for p in network.parameters() if p.requires_grad]
    vectors = {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}
    return [{"params": [p for p in trained if p.ndim >= 2]}, vectors]
