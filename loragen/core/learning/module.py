"""Generator training as a LightningModule: adapters from prompts, judged by the objectives.

What happens around the steps of generator training: metrics, checkpoints, the end of it.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from loragen.core.config.schema import GenTrainingSection
from loragen.core.generator.model import CHECKPOINT_KEY, Generator
from loragen.core.generator.network import Network
from loragen.core.learning.arrays import conditions
from loragen.core.learning.batches import PairBatch
from loragen.core.learning.objectives.behaviour import Losses, Objectives
from loragen.core.learning.plan import Objective, Selection, StepPlan, averaged, optimizer_for
from loragen.core.progress import Step, Validation
from loragen.core.run.directory import (
    BEST_CHECKPOINT,
    CHECKPOINT_SUFFIX,
    CHECKPOINTS,
    LAST_CHECKPOINT,
)
from loragen.core.run.loop import (
    Interruption,
    RunSession,
    StepCallback,
    check_loss,
    check_weights,
    step_schedule,
)

log = logging.getLogger(__name__)

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
        training: GenTrainingSection,
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


class GeneratorMetrics(StepCallback):
    """Logs every optimizer step and every validation, at the true step."""

    def __init__(
        self, session: RunSession, plan: StepPlan, pairs_per_step: Callable[[Objective], int]
    ) -> None:
        self.session, self.plan, self.pairs_per_step = session, plan, pairs_per_step
        self.latest: dict[str, float] = {}
        """Of the last step and of the last validation, resumed or not."""
        self._speed = Speed()

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        self._speed = Speed()

    def on_step(self, trainer: Trainer, pl_module: Any, batch: PairBatch) -> None:
        step = trainer.global_step
        phase, within = self.plan.phases.at(step)
        speed = self._speed.after(self.pairs_per_step(phase.objective), phase.objective)
        found = _over_devices(trainer, pl_module.step_metrics)
        validated = {key: value for key, value in self.latest.items() if key.startswith("val")}
        self.latest = validated | found
        rate = self.plan.rate(step)
        more = {"train/lr": rate.learning_rate, "train/epoch": self.plan.epochs(step)}
        self.session.log_metrics(found | more, step)
        self.session.report(
            Step(
                step,
                self.plan.total,
                rate.stage,
                found["train/loss"],
                speed,
                "pairs/s",
                phase.objective,
                (within, phase.steps),
            )
        )
        check_loss("train/loss", found["train/loss"], step, self.session.directory)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        found = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val")}
        self.latest |= found
        self.session.log_metrics(found, trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        return {"latest": self.latest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.latest = dict(state_dict["latest"])


class Speed:
    """Pairs per second, in the mean over the steps of a phase that were done here: single steps
    vary, and those after a validation look slow."""

    def __init__(self) -> None:
        self._phase, self._pairs = "", 0
        self._began = self._last = time.perf_counter()

    def after(self, pairs: int, phase: str) -> float:
        """Once for every step, when it is done: its pairs, and what it was for."""
        if phase != self._phase:
            self._phase, self._pairs, self._began = phase, 0, self._last
        self._last = time.perf_counter()
        self._pairs += pairs
        return self._pairs / (self._last - self._began)


class Averaging(StepCallback):
    """The average of the weights takes in every step, before it is validated or saved."""

    def on_step(self, trainer: Trainer, pl_module: Any, batch: PairBatch) -> None:
        if pl_module.averaged:
            pl_module.averaged.update_parameters(pl_module.trained)


class GeneratorCheckpoints(StepCallback):
    """Keeps the best step by validation; renews last.ckpt in between and at the end.

    A step that validates is saved after it. A new best is the newest there is to go on from, and
    takes the place of last.ckpt until that is due again: a resumed run never needs a best that a
    later one has replaced. A checkpoint is described, so that it is a generator itself.
    """

    def __init__(
        self,
        session: RunSession,
        generator: Generator,
        selection: Selection,
        plan: StepPlan,
        interruption: Interruption,
        *,
        val_every: int | None,
        last_every: int,
    ) -> None:
        """In optimizer steps; `val_every` None: nothing validates."""
        self.session, self.generator = session, generator
        self.selection, self.plan, self.interruption = selection, plan, interruption
        self.val_every, self.last_every = val_every, last_every
        self._best: dict[str, Any] | None = None
        self._last_step = 0
        """Of last.ckpt, 0 where there is none: all ranks decide by it, and none by looking."""

    @property
    def best(self) -> Path | None:
        """The checkpoint that validation has chosen so far."""
        return self._folder / self._best["name"] if self._best else None

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        self.interruption.listen()

    def on_step(self, trainer: Trainer, pl_module: Any, batch: PairBatch) -> None:
        step = trainer.global_step
        if step == self.plan.total:
            trainer.should_stop = True  # Lightning then validates the last step, too
        if not self._validates(step):
            self._after(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Early, while the trainer still knows what it has measured."""
        metric, step = str(self.selection.metric), trainer.global_step
        value = float(trainer.callback_metrics[metric])
        check_loss(metric, value, step, self.session.directory)
        if self.selection.accepts(value, self._best["lowest"] if self._best else None):
            self._keep(trainer, value)
        self._report(trainer)
        self._after(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """A finished run has its last step, also where it was killed just before that."""
        if self._last_step != trainer.global_step:
            self._renew_last(trainer)
        if self._best and trainer.is_global_zero:
            self._tell_of_a_phase_in_vain(self._best["step"])

    def _tell_of_a_phase_in_vain(self, best_step: int) -> None:
        best, within = self.plan.phases.at(best_step)
        last = self.plan.phases.phases[-1].objective
        if best.objective != last:
            log.warning(
                "%s has made %s worse: kept is step %d of %s (try a lower behaviour.learning_rate)",
                last,
                self.selection.metric,
                within,
                best.objective,
            )

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[CHECKPOINT_KEY] = self.generator.describe_in_checkpoint(
            pl_module.kept, self.plan.total
        )

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._best, self._last_step = state_dict["best"], state_dict["last_step"]

    def _validates(self, step: int) -> bool:
        return bool(self.val_every) and (
            step % (self.val_every or 1) == 0 or step == self.plan.total
        )

    def _after(self, trainer: Trainer) -> None:
        step = trainer.global_step
        stops = self.interruption.requested_on_any(trainer) and step < self.plan.total
        covered = self._best is not None and self._best["step"] == step
        if (stops or step % self.last_every == 0) and not covered:
            self._renew_last(trainer)
        if stops:
            raise self.interruption.error_after(
                step, self.plan.total, f"gen train --resume {self.session.directory}"
            )

    def _report(self, trainer: Trainer) -> None:
        assert self._best is not None  # whatever is validated first is the best so far
        phase, within = self.plan.phases.at(trainer.global_step)
        best, best_within = self.plan.phases.at(self._best["step"])
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val")}
        self.session.report(
            Validation(
                phase.objective, (within, phase.steps), metrics, (best.objective, best_within)
            )
        )

    def _keep(self, trainer: Trainer, value: float) -> None:
        epoch = int(self.plan.epochs(trainer.global_step))
        name = f"epoch={epoch}-{self.selection.label(value)}{CHECKPOINT_SUFFIX}"
        lowest = min(value, self._best["lowest"]) if self._best else value
        self._best = {"name": name, "lowest": lowest, "step": trainer.global_step}
        self._last_step = 0
        self._save(trainer, self._folder / name)
        if trainer.is_global_zero:
            for file in (*self._folder.glob(BEST_CHECKPOINT), self._folder / LAST_CHECKPOINT.name):
                if file.name != name:
                    file.unlink(missing_ok=True)

    def _renew_last(self, trainer: Trainer) -> None:
        self._last_step = trainer.global_step
        self._save(trainer, self._folder / LAST_CHECKPOINT.name)

    def _save(self, trainer: Trainer, file: Path) -> None:
        module: Any = trainer.lightning_module
        module.settle()
        weights = module.state_dict()
        check_weights(weights, trainer.global_step, self.session.directory)
        trainer.save_checkpoint(file, weights_only=False)  # on all ranks: it has a barrier

    @property
    def _folder(self) -> Path:
        return self.session.directory / CHECKPOINTS


def _over_devices(trainer: Trainer, metrics: dict[str, Any]) -> dict[str, float]:
    """The mean over devices, each of which has as many pairs."""
    values = torch.stack([torch.as_tensor(value).float() for value in metrics.values()])
    mean = trainer.strategy.reduce(values, reduce_op="mean")
    assert isinstance(mean, torch.Tensor)
    return dict(zip(metrics, mean.tolist(), strict=True))
