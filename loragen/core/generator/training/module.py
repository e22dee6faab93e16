"""Generator training as a LightningModule: adapters from prompts, judged by the objectives."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from loragen.core.config.gen_schema import GenTraining
from loragen.core.generator.network import Network
from loragen.core.generator.training.encoding import conditions
from loragen.core.generator.training.objectives import Losses, Objectives
from loragen.core.generator.training.optimization import StepPlan, averaged, optimizer_for
from loragen.core.generator.training.pairs import PairBatch
from loragen.core.steps import step_schedule

VALIDATION = ("val", "val_unseen")
"""Held-out prompt texts of the training datasets, and held-out datasets."""


class GeneratorModule(LightningModule):
    """A network on its way through the phases: what a batch holds says which objective it is for.

    Validation looks at the reconstruction of held-out pairs and, where the base is at hand, at its
    loss and accuracy on held-out rows with the generated adapter in place.
    """

    def __init__(
        self,
        network: Network,
        plan: StepPlan,
        objectives: Objectives,
        training: GenTraining,
        *,
        encoder: Any = None,
        first_step: int = 0,
        optimizer_state: dict[str, Any] | None = None,
    ) -> None:
        """`encoder` where it is trained along; `first_step` steps are done already and have left
        `optimizer_state`."""
        super().__init__()
        self.network = network
        self.encoder = encoder.train() if encoder else None
        self.plan, self.training_options = plan, training
        self.averaged = averaged(self.trained, training.ema_decay)
        # No submodules: what they hold is the same in all checkpoints, and the base may be large.
        self._objectives = objectives
        self.first_step, self._optimizer_state = first_step, optimizer_state
        self._settled: int | None = None
        self.step_metrics: dict[str, Any] = {}
        """Of this device's part of the last training step: the mean of its micro-batches."""

    @property
    def trained(self) -> nn.ModuleDict:
        """`network` and, where it is trained along, `encoder`."""
        parts = {"network": self.network, "encoder": self.encoder}
        return nn.ModuleDict({name: part for name, part in parts.items() if part is not None})

    @property
    def kept(self) -> nn.ModuleDict:
        """What is validated and saved: the average of the weights where one is wanted."""
        found = self.averaged.module if self.averaged else self.trained
        assert isinstance(found, nn.ModuleDict)
        return found

    def on_fit_start(self) -> None:
        self._objectives.to(self.device)

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        condition, mask = _condition(batch, self.encoder)
        loss, metrics = self._losses(self._written(batch, condition, mask), batch)
        parts = self.trainer.accumulate_grad_batches
        before = {} if batch_idx % parts == 0 else self.step_metrics
        self.step_metrics = {
            f"train/{name}": before.get(f"train/{name}", 0.0) + value / parts
            for name, value in metrics.items()
        }
        return loss

    def _written(self, batch: PairBatch, condition: Tensor, mask: Tensor) -> Tensor:
        """``[batch, tokens, token_dim]``, normalised."""
        condition, known, others = self._with_noise(condition), self._objectives.known, batch.others
        if known is None or others is None:
            tokens: Tensor = self.network(condition, mask)
            return tokens
        others = others._replace(condition=self._with_noise(others.condition))
        return known.written(self.network, condition, mask, others)

    def settle(self) -> None:
        """Makes what is kept write as it has learned to by this step; to be called before it is
        used."""
        if self._objectives.known and self._settled != self.trainer.global_step:
            network = self.kept["network"]
            assert isinstance(network, Network)
            self._objectives.known.settle(network)
            self._settled = self.trainer.global_step

    def on_validation_start(self) -> None:
        self.settle()

    def _losses(self, written: Tensor, batch: PairBatch) -> Losses:
        reconstruction, behaviour = self._objectives.reconstruction, self._objectives.behaviour
        if batch.rows is None:
            return reconstruction(written, batch.tokens, self.training_options.target_noise)
        assert behaviour is not None
        loss, metrics = behaviour(written, batch.rows)
        share = self._objectives.reconstruction_weight
        if share:
            beside, more = reconstruction(written, batch.tokens)
            loss, metrics = loss + share * beside, more | metrics
        return loss, {**metrics, "loss": loss.detach()}

    def _with_noise(self, condition: Tensor) -> Tensor:
        """Gaussian, in units of the spread of every dimension of the conditions."""
        share = self.training_options.condition_noise
        if not share:
            return condition
        return condition + share * self.network.condition_spread * torch.randn_like(condition)

    def validation_step(self, batch: PairBatch, batch_idx: int, dataloader_idx: int) -> None:
        reconstruction, behaviour = self._objectives.reconstruction, self._objectives.behaviour
        kept = self.kept
        condition, mask = _condition(batch, kept["encoder"] if self.encoder else None)
        written = kept["network"](condition, mask)
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
        # Lightning clips no gradients of a fused optimizer in mixed precision.
        fused = not (self.trainer.gradient_clip_val and "mixed" in str(self.trainer.precision))
        optimizer = optimizer_for(self.trained, self.training_options, fused)
        if self._optimizer_state:
            optimizer.load_state_dict(self._optimizer_state)
            self._optimizer_state = None  # as large as the weights, twice
        schedule = step_schedule(
            optimizer, lambda step: self.plan.rate(step).learning_rate, self.first_step
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def _condition(batch: PairBatch, encoder: Any) -> tuple[Tensor, Tensor]:
    """``[batch, prompts, positions, dim]`` and its mask, embedded beforehand or now."""
    if encoder is None:
        return batch.condition, batch.mask
    assert batch.texts is not None
    return conditions(encoder, batch.texts)
