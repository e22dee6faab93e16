"""Callbacks of a generator's training: metrics, averaging, checkpoints."""

import logging
import time
from dataclasses import dataclass
from math import inf, isnan
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from loragen.core.generator.model import CHECKPOINT_KEY, Generator, collected_file
from loragen.core.learning.data import PairBatch
from loragen.core.learning.plan import Phases
from loragen.core.progress import Step, Validation
from loragen.core.protocols import Metric
from loragen.core.run.directory import BEST_CHECKPOINT, CHECKPOINT_SUFFIX
from loragen.core.run.loop import (
    CheckpointCallback,
    Interruption,
    RunSession,
    StepCallback,
    check_loss,
)

log = logging.getLogger(__name__)

SAMPLED = 1024  # values of a weight that are compared with those before the training
UNMOVED = 1e-9  # a smaller change of a weight is none


@dataclass(frozen=True)
class Selection:
    """The rule by which a step of a training is kept. It uses validation data alone."""

    metric: str | None
    """A metric such as `val_unseen/loss`; None if nothing is held out: the last step is kept."""
    sentence: str = "the last step (nothing was held out)"
    """The rule in words, for the generator's file."""
    tolerance: float = 0.0

    def accepts(self, value: float, lowest: float | None) -> bool:
        """Returns whether a validated step replaces the one kept so far; NaN is the worst value."""
        if lowest is None:
            return True
        new, old = (inf if isnan(one) else one for one in (value, lowest))
        return new <= old + self.tolerance if self.tolerance else new < old

    def label(self, value: float) -> str:
        """Returns `val_loss=0.1234`, for a file's name."""
        return f"val_{str(self.metric).rpartition('/')[2]}={value:.4f}"


def select_by(metric: Metric, has_val_texts: bool, has_val_sources: bool) -> Selection:
    """Returns the rule for an objective's metric.

    Held-out datasets decide if there are any, because a generator is made for new datasets. If the
    metric changes by no more than its tolerance, the later step is kept: it has trained longer.
    """
    if not (has_val_texts or has_val_sources):
        return Selection(None)
    where, what = ("val_unseen", "datasets") if has_val_sources else ("val", "prompts")
    key, described = f"{where}/{metric.name}", f"{metric.description} of held-out {what}"
    if not metric.tolerance:
        return Selection(key, f"lowest {key}, {described}")
    rule = f"the last validated step with {key}, {described}, within {metric.tolerance} of the"
    return Selection(key, f"{rule} lowest before", metric.tolerance)


class GeneratorMetrics(StepCallback):
    """Logs every optimizer step and every validation, at the true step."""

    def __init__(self, session: RunSession, phases: Phases) -> None:
        self.session, self.phases = session, phases
        self.latest: dict[str, float] = {}
        """Metrics of the last step and of the last validation, restored on resume."""
        self._speed = Speed()
        self._started: list[torch.Tensor] = []
        """Values of every weight before the first step of this process."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        self._speed = Speed()
        self._started = []

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Warns if the training has not changed the generator."""
        if not self._started or not trainer.is_global_zero:
            return
        pairs = zip(self._started, _sample(pl_module), strict=True)
        if all(torch.allclose(before, after, rtol=0, atol=UNMOVED) for before, after in pairs):
            rates = map(self.phases.rate, range(1, max(1, trainer.global_step) + 1))
            log.warning(
                "%s: nothing was learned: no weight of the generator has moved; the learning rate "
                "(%g at most) may be too low",
                self.session.directory,
                max(rate.learning_rate for rate in rates),
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self._started = self._started or _sample(pl_module)

    def on_step(self, trainer: Trainer, pl_module: Any, batch: PairBatch) -> None:
        step = trainer.global_step
        (phase, within), rate = self.phases.at(step), self.phases.rate(step)
        speed = self._speed.after(
            phase.objective.batch_size * trainer.accumulate_grad_batches, phase.name
        )
        # All processes have equally many pairs, so the mean over processes is that over pairs.
        values = [torch.as_tensor(value).float() for value in pl_module.step_metrics.values()]
        mean = trainer.strategy.reduce(torch.stack(values), reduce_op="mean")
        assert isinstance(mean, torch.Tensor)
        found = dict(zip(pl_module.step_metrics, mean.tolist(), strict=True))
        validated = {key: value for key, value in self.latest.items() if key.startswith("val")}
        self.latest = validated | found
        more = {"train/lr": rate.learning_rate, "train/epoch": self.phases.epochs(step)}
        self.session.log_metrics(found | more, step)
        loss, of_phase = found["train/loss"], (within, phase.steps)
        self.session.report(
            Step(step, self.phases.total, rate.stage, loss, speed, "pairs/s", phase.name, of_phase)
        )
        check_loss("train/loss", loss, step, self.session.directory)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        found = validation_metrics(trainer)
        self.latest |= found
        self.session.log_metrics(found, trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        return {"latest": self.latest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.latest = dict(state_dict["latest"])


def _sample(module: Any) -> list[torch.Tensor]:
    """Returns values of every weight that trains, the same at every call. They are spread over the
    weight: a part of it may have no gradient, as that which writes a frozen A."""
    random, found = torch.Generator().manual_seed(0), []
    for weight in (p for p in module.parameters() if p.requires_grad):
        chosen = torch.randint(weight.numel(), (SAMPLED,), generator=random)
        found.append(weight.detach().flatten()[chosen.to(weight.device)])
    return found


def validation_metrics(trainer: Trainer) -> dict[str, float]:
    """Returns the metrics of the validation that has just ended."""
    found = trainer.callback_metrics.items()
    return {key: float(value) for key, value in found if key.startswith("val")}


class Speed:
    """Measures pairs per second, as a mean over the steps of a phase in this process.

    Single steps vary, and the first one after a validation includes its time.
    """

    def __init__(self) -> None:
        self._phase, self._pairs = "", 0
        self._began = self._last = time.perf_counter()

    def after(self, pairs: int, phase: str) -> float:
        """Returns pairs per second; has to be called after every step, with its pairs and phase."""
        if phase != self._phase:
            self._phase, self._pairs, self._began = phase, 0, self._last
        self._last = time.perf_counter()
        self._pairs += pairs
        return self._pairs / (self._last - self._began)


class Averaging(StepCallback):
    """Adds every step to the average of the weights, before it is validated or saved."""

    def on_step(self, trainer: Trainer, pl_module: Any, batch: PairBatch) -> None:
        if pl_module.averaged:
            pl_module.averaged.update_parameters(pl_module.trainable_modules)


class GeneratorCheckpoints(CheckpointCallback):
    """Keeps the best step by validation; renews last.ckpt in between and at the end.

    A step that is validated is saved after its validation. A new best step replaces last.ckpt until
    that is due again, since it is the newest checkpoint: a resumed run never needs a best that a
    later one has replaced. A checkpoint carries the generator's description, so that it can be
    loaded as a generator.
    """

    command = "gen train"

    def __init__(
        self,
        session: RunSession,
        generator: Generator,
        selection: Selection,
        phases: Phases,
        interruption: Interruption,
        *,
        val_every: int | None,
        last_every: int,
    ) -> None:
        """`val_every` and `last_every` are optimizer steps; None: there is no validation."""
        super().__init__(session, interruption, last_every)
        self.generator, self.selection, self.phases = generator, selection, phases
        self.val_every = val_every
        self._best: dict[str, Any] | None = None
        self._last_step = 0
        """Step stored in last.ckpt, 0 if none. It is tracked in memory so that all processes decide
        alike without reading the disk."""

    @property
    def best(self) -> Path | None:
        """The checkpoint that validation has chosen so far."""
        return self.last_file.with_name(self._best["name"]) if self._best else None

    @property
    def best_step(self) -> int | None:
        return self._best["step"] if self._best else None

    def on_step(self, trainer: Trainer, pl_module: Any, batch: PairBatch) -> None:
        step, last = trainer.global_step, trainer.global_step == self.phases.total
        if last:
            trainer.should_stop = True  # Lightning then validates the last step, too
        if not (self.val_every and (last or step % self.val_every == 0)):
            self._after_step(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        step, metrics = trainer.global_step, validation_metrics(trainer)
        value = metrics[str(self.selection.metric)]
        check_loss(str(self.selection.metric), value, step, self.session.directory)
        if self.selection.accepts(value, self._best["lowest"] if self._best else None):
            self._keep(trainer, value)
        assert self._best is not None  # the first validated step is the best so far
        phase, within = self.phases.at(step)
        best, best_within = self.phases.at(self._best["step"])
        self.session.report(
            Validation(phase.name, (within, phase.steps), metrics, (best.name, best_within))
        )
        self._after_step(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Saves the last step if it is not yet, and warns if an earlier phase had the best one."""
        if self._last_step != trainer.global_step:
            self.save_last(trainer)
        if not (self._best and trainer.is_global_zero):
            return
        best, within = self.phases.at(self._best["step"])
        last = self.phases.last
        if best.name != last.name:
            log.warning(
                "%s increased during the phase %s; keeping step %d of %s (try a lower %s)",
                self.selection.metric,
                last.name,
                within,
                best.name,
                last.objective.learning_rate_key,
            )

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        described = self.generator.describe_in_checkpoint(pl_module.eval_modules, self.phases.total)
        checkpoint[CHECKPOINT_KEY] = described

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._best, self._last_step = state_dict["best"], state_dict["last_step"]

    def _after_step(self, trainer: Trainer) -> None:
        step = trainer.global_step
        is_best = self._best is not None and self._best["step"] == step
        self.end_step(trainer, is_saved=is_best, can_stop=step < self.phases.total)

    def _keep(self, trainer: Trainer, value: float) -> None:
        """Saves this step as the best one, and deletes the previous best and last.ckpt."""
        epoch = int(self.phases.epochs(trainer.global_step))
        name = f"epoch={epoch}-{self.selection.label(value)}{CHECKPOINT_SUFFIX}"
        lowest = min(value, self._best["lowest"]) if self._best else value
        self._best = {"name": name, "lowest": lowest, "step": trainer.global_step}
        self._last_step = 0
        self.save(trainer, self.last_file.with_name(name))
        if trainer.is_global_zero:
            for file in (*self.last_file.parent.glob(BEST_CHECKPOINT), self.last_file):
                if file.name != name:
                    file.unlink(missing_ok=True)

    def save_last(self, trainer: Trainer) -> None:
        self._last_step = trainer.global_step
        self.save(trainer, self.last_file)

    def save(self, trainer: Trainer, file: Path) -> None:
        module: Any = trainer.lightning_module
        module.finalize()
        if self.generator.collected and trainer.is_global_zero:
            self.generator.collected.save(collected_file(file))
        super().save(trainer, file)
