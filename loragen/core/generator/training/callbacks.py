"""What happens around the steps of generator training: metrics, checkpoints, the end of it."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from loragen.core.divergence import check_loss, check_weights
from loragen.core.generator.model import Generator
from loragen.core.generator.training.optimization import StepPlan
from loragen.core.generator.training.pairs import PairBatch
from loragen.core.generator.training.phases import Objective
from loragen.core.generator.training.selection import Selection
from loragen.core.generator.unfinished import KEY, description
from loragen.core.interrupt import Interruption
from loragen.core.progress import Step, Validation
from loragen.core.runs import BEST_CHECKPOINT, CHECKPOINT_SUFFIX, CHECKPOINTS, LAST_CHECKPOINT
from loragen.core.session import RunSession
from loragen.core.steps import StepCallback

log = logging.getLogger(__name__)


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
        checkpoint[KEY] = description(self.generator, pl_module.kept, self.plan.total)

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
        self.session.report_validation(
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
