"""What a generator is trained for, step by step.

Light.

What a generator's training will work on and towards, known before anything is written.

How the weights move: the number of steps and their rates, and the optimizer.

Which step of a training is kept: by validation data only, never by anything else. Light.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf, isnan
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from loragen.core.adapter.files import module_scaling
from loragen.core.adapter.layout import Layout
from loragen.core.base.load import empty_base, is_local
from loragen.core.config import GenTrainConfig
from loragen.core.config.schema import GenTrainingSection
from loragen.core.errors import DataError, LoragenError, UsageError, listing
from loragen.core.learning.sources import TrainingSource, common_layout, read_sources
from loragen.core.learning.texts import has_rows
from loragen.core.plugins import create, find
from loragen.core.protocols import Rate, Schedule, Transfers

Objective = Literal["reconstruction", "behaviour", "transfer"]
"""The collected weights; what the base does with the generated ones; the same, each adapter being
written from the other datasets alone, as if its own had never been collected."""


@dataclass(frozen=True)
class Phase:
    objective: Objective
    steps: int


@dataclass(frozen=True)
class Phases:
    """The phases in their order. Every one has a schedule of its own, from its first step on."""

    phases: tuple[Phase, ...]

    @property
    def total(self) -> int:
        """Optimizer steps of all phases together."""
        return sum(phase.steps for phase in self.phases)

    def at(self, step: int) -> tuple[Phase, int]:
        """The phase of optimizer step `step`, counted from 1, and the step within it, likewise.

        Beyond the last step it is the last one."""
        for phase in self.phases:
            if step <= phase.steps:
                return phase, step
            step -= phase.steps
        return self.phases[-1], self.phases[-1].steps

    @property
    def reconstruction(self) -> bool:
        """Whether pairs are drawn for their weights."""
        return any(phase.objective == "reconstruction" for phase in self.phases)

    @property
    def behaviour(self) -> bool:
        """Whether the base model is needed."""
        return any(phase.objective != "reconstruction" for phase in self.phases)

    def __str__(self) -> str:
        return ", then ".join(f"{phase.steps} steps of {phase.objective}" for phase in self.phases)


DATASETS_PER_LEFT_OUT = 2
"""For every dataset that a step of transfer leaves out, another has to be there to write from."""
TRAINS_ALONG = "the encoder trains along"
MOST_ON_CPU = 100_000_000
"""Parameters of a base that `auto` trains through without a GPU. A step of 64 rows of 100 tokens is
6 · 6400 operations a parameter at most: with this many some ten seconds at 350 GFLOP/s."""


@dataclass(frozen=True)
class Plan:
    config: GenTrainConfig
    """With an objective where it was `auto`."""
    sources: list[TrainingSource]
    unseen: list[TrainingSource]
    layout: Layout
    reason: str
    """Why this objective."""

    @property
    def base_model(self) -> str:
        """What the adapters are for."""
        return self.sources[0].base_model

    def summary(self) -> str:
        checkpoints = sum(len(source.checkpoints) for source in self.sources)
        return (
            f"{len(self.sources)} datasets, {checkpoints} checkpoints of {self.layout.values:,} "
            f"values -> {self.layout.tokens:,} tokens of {self.layout.token_dim} "
            f"(fill {self.layout.values / (self.layout.tokens * self.layout.token_dim):.1%})\n"
            f"objective: {self.config.training.objective} ({self.reason})"
        )


def plan(config: GenTrainConfig) -> Plan:
    """Finds every source, derives the layout and settles the objective.

    Raises UsageError or DataError.
    """
    sources, unseen = read_sources(config)
    for source in (*sources, *unseen):
        if source.base_model != sources[0].base_model:
            raise DataError(
                f"{source.name} was trained on {source.base_model}, {sources[0].name} on "
                f"{sources[0].base_model}: a generator serves one base model"
            )
    layout = common_layout([*sources, *unseen], config)
    _check_scaling(layout, [*sources, *unseen])
    if config.training.importance and len(sources) < 2:
        raise UsageError("training.importance compares datasets: it needs two at least")
    settled, reason = _with_objective(config, sources)
    return Plan(settled, sources, unseen, layout, reason)


def _check_scaling(layout: Layout, sources: Sequence[TrainingSource]) -> None:
    """A generator's adapters have one configuration. Raises DataError where alpha over rank, or
    what PEFT makes of it, differs between sources: equal factors would mean another ΔW."""
    for path in dict.fromkeys(spec.path for spec in layout.tensors):
        scalings = [module_scaling(source.adapter_config, path) for source in sources]
        for source, scaling in zip(sources, scalings, strict=True):
            if scaling != scalings[0]:
                raise DataError(
                    f"{source.name}: ΔW is {scaling:g} · BA in {path}, and {scalings[0]:g} · BA in "
                    f"{sources[0].name} (lora_alpha, rank): a generator serves one scaling"
                )


def _with_objective(
    config: GenTrainConfig, sources: Sequence[TrainingSource]
) -> tuple[GenTrainConfig, str]:
    """Raises UsageError where an objective was asked for that the sources do not allow."""
    asked = config.training.objective
    obstacle = None if asked == "reconstruction" else _obstacle(config, sources)
    if asked != "auto":
        if obstacle:
            raise UsageError(f"training.objective {asked}: {obstacle}")
        return config.with_objective(asked), "as configured"
    if why := obstacle or _too_large(config, sources):
        return config.with_objective("reconstruction"), why
    here = "the base and labelled rows of every dataset are here"
    if why := _no_transfer(config, sources):
        settled = config.with_objective("reconstruction-then-behaviour")
        return settled, f"{here}; no transfer: {why}"
    why = "datasets enough to write each from others"
    return config.with_objective("transfer"), f"{here}, and {why}"


def _no_transfer(config: GenTrainConfig, sources: Sequence[TrainingSource]) -> str | None:
    """Why no adapter can be written from other datasets alone; None where it can."""
    decoder = find("decoder", config.decoder.name)
    options = decoder.Config(**config.decoder.options)
    if not issubclass(decoder, Transfers) or decoder.transfer_parameters(options) is None:
        return f"the decoder {config.decoder.name} cannot, as it is configured"
    encoder = find("encoder", config.encoder.name)
    if not getattr(encoder.Config(**config.encoder.options), "frozen", True):
        return TRAINS_ALONG
    needed = config.behaviour.batch_size * DATASETS_PER_LEFT_OUT
    datasets = len({source.dataset for source in sources})
    if datasets < needed:
        return (
            f"{datasets} datasets; behaviour.batch_size {config.behaviour.batch_size} leaves "
            f"too few others, it needs {needed}"
        )
    return None


def _obstacle(config: GenTrainConfig, sources: Sequence[TrainingSource]) -> str | None:
    """Why the behaviour of adapters cannot be trained; None where it can."""
    if config.training.objective == "transfer" and (why := _no_transfer(config, sources)):
        return why
    missing = [source.name for source in sources if not has_rows(source)]
    if missing:
        return f"labelled rows are missing of {listing(missing, 3)}"
    base = config.behaviour.base_model or sources[0].base_model
    if config.training.objective == "auto" and not is_local(base):
        return f"the base model {base} is not on this machine"
    return None


def _has_gpu(config: GenTrainConfig) -> bool:
    return config.trainer.accelerator != "cpu" and torch.cuda.is_available()


def _too_large(config: GenTrainConfig, sources: Sequence[TrainingSource]) -> str | None:
    base = config.behaviour.base_model or sources[0].base_model
    try:
        with torch.device("meta"):
            model = empty_base(base, local_files_only=True).model
    except LoragenError:
        return f"the base model {base} is not on this machine"
    size = sum(parameter.numel() for parameter in model.parameters())
    if size > MOST_ON_CPU and not _has_gpu(config):
        return f"the base model has {size / 1e9:.1f} B parameters, and there is no GPU"
    return None


@dataclass(frozen=True)
class StepPlan:
    """The optimizer steps of a whole training, whatever of it is done already."""

    phases: Phases
    schedules: Mapping[Objective, Schedule]
    """Each phase has its own, from its first step to its last."""
    per_epoch: int
    """Steps of reconstruction in which every checkpoint comes once."""

    @property
    def transfers(self) -> bool:
        return any(phase.objective == "transfer" for phase in self.phases.phases)

    @property
    def total(self) -> int:
        return self.phases.total

    def rate(self, step: int) -> Rate:
        """Of optimizer step `step`, counted from 1. (LambdaLR also asks for the one after the
        last.)"""
        phase, within = self.phases.at(step)
        return self.schedules[phase.objective](within, phase.steps)

    def epochs(self, step: int) -> float:
        """How often every checkpoint would have been seen after `step` steps."""
        return step / self.per_epoch


def step_plan(config: GenTrainConfig, per_epoch: int) -> StepPlan:
    """As `training`, `behaviour` and `trainer.limit_train_batches` end the phases."""
    objective = config.training.objective
    steps = config.training.max_epochs * per_epoch
    reconstruction = Phase("reconstruction", min(steps, config.training.max_steps or steps))
    behaviour = Phase("behaviour", config.behaviour.max_steps)
    transfer = Phase("transfer", config.behaviour.max_steps)
    wanted = {
        "reconstruction": (reconstruction,),
        "behaviour": (behaviour,),
        "transfer": (transfer,),
        "reconstruction-then-behaviour": (reconstruction, behaviour),
    }[objective]
    phases = tuple(Phase(one.objective, _limited(config, one.steps)) for one in wanted)
    schedules: dict[Objective, Schedule] = {
        "reconstruction": _schedule(config, config.training.learning_rate),
        "behaviour": _schedule(config, config.behaviour.rate),
        "transfer": _schedule(config, config.behaviour.transfer_rate),
    }
    return StepPlan(Phases(phases), schedules, per_epoch)


def _limited(config: GenTrainConfig, steps: int) -> int:
    limit = config.trainer.limit_train_batches
    if isinstance(limit, float):
        return ceil(steps * min(limit, 1.0))
    return min(steps, ceil(limit / config.trainer.accumulate_grad_batches)) if limit else steps


def _schedule(config: GenTrainConfig, learning_rate: float) -> Schedule:
    """`learning_rate` is meant for any schedule with a `learning_rate` left at its default."""
    options = config.schedule.options
    known = find("schedule", config.schedule.name).Config.model_fields.get("learning_rate")
    if known is not None and options.get("learning_rate", known.default) == known.default:
        options = {**options, "learning_rate": learning_rate}
    schedule: Schedule = create("schedule", config.schedule.name, options)
    return schedule


def optimizer_for(
    trained: nn.ModuleDict, options: GenTrainingSection, fused: bool = True
) -> torch.optim.Optimizer:
    """Of the network and, where it trains, the encoder; `step_schedule` multiplies the rates.

    `fused`: one pass over weights, gradient and moments in place of some ten.
    """
    groups = _groups(trained["network"], 1.0)
    if "encoder" in trained:
        groups += _groups(trained["encoder"], options.encoder_rate)
    decay = options.weight_decay
    match options.optimizer:
        case "adamw":
            return torch.optim.AdamW(groups, lr=1.0, weight_decay=decay, fused=fused)
        case "adam":
            return torch.optim.Adam(groups, lr=1.0, weight_decay=decay, fused=fused)
        case "sgd":
            momentum = options.momentum
            return torch.optim.SGD(
                groups, lr=1.0, weight_decay=decay, momentum=momentum, fused=fused
            )


def _groups(module: nn.Module, factor: float) -> list[dict[str, Any]]:
    """Vectors (biases, norms) are not decayed, matrices are."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "factor": factor},
        {"params": [p for p in trained if p.ndim < 2], "factor": factor, "weight_decay": 0.0},
    ]


def averaged(trained: nn.ModuleDict, decay: float | None) -> AveragedModel | None:
    """A copy that follows the weights as their exponential moving average, and starts as they
    are after the first step; None where none is wanted."""
    if decay is None:
        return None
    copy = AveragedModel(trained, multi_avg_fn=get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]  # torch's
    return copy.requires_grad_(False)


WITHIN = 0.01
"""Nats of the base's loss on a few held-out rows: what is less is chance."""


@dataclass(frozen=True)
class Selection:
    """The rule, as the model file tells it."""

    metric: str | None
    """What is watched, `val_unseen/loss`; None where nothing is held out."""
    sentence: str = "the last step (nothing was held out)"
    tolerance: float = 0.0
    """By how much a later step may be worse than the lowest so far and still take its place."""

    def accepts(self, value: float, lowest: float | None) -> bool:
        """Whether a validated step takes the place of the one kept so far. What is no number is
        the worst."""
        if lowest is None:
            return True
        new, old = (inf if isnan(one) else one for one in (value, lowest))
        return new <= old + self.tolerance if self.tolerance else new < old

    def label(self, value: float) -> str:
        """`val_loss=0.1234`, for a file's name."""
        return f"val_{str(self.metric).rpartition('/')[2]}={value:.4f}"


def select_by(seen: bool, unseen: bool, tried: bool) -> Selection:
    """The rule, given whether prompts of the training datasets, and whole datasets, are held out,
    and whether the base model is tried on held-out rows with the generated adapters.

    New datasets are what a generator is for: they decide where there are any. So does what an
    adapter does, over what it looks like; its loss, since accuracies are coarse on few rows. Where
    that no longer changes, the later step is taken, which has had more of the training.
    """
    if not (seen or unseen):
        return Selection(None)
    where, who = ("val_unseen", "datasets") if unseen else ("val", "prompts")
    if tried:
        told = (
            f"the last validated step with {where}/behaviour, the base's loss on held-out rows of "
            f"held-out {who}, within {WITHIN} of the lowest before"
        )
        return Selection(f"{where}/behaviour", told, WITHIN)
    return Selection(f"{where}/loss", f"lowest {where}/loss, reconstructing held-out {who}")
