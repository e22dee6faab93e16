"""The plan of a generator's training: its sources and its objective. Nothing is written yet.

`make_plan` checks that the sources fit together and chooses the objective; `make_phases` turns the
objective, or several in a row, into phases: optimizer steps with learning rates.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch

from loragen.core.adapter.checks import changes_nothing, module_scaling, warn_of_config
from loragen.core.adapter.files import Adapter, fitting_shapes, shape_mismatch, tensors_hash
from loragen.core.adapter.layout import Layout
from loragen.core.base.load import empty_base, is_local
from loragen.core.base.names import is_gguf
from loragen.core.config import GenTrainConfig
from loragen.core.config.schema import AUTO, LayoutSection, PluginSection, phases_in
from loragen.core.errors import DataError, LoragenError, PluginError, UsageError, counted, listing
from loragen.core.generator.network import method
from loragen.core.learning.sources import Sources, TrainingSource
from loragen.core.plugins import create, find, names
from loragen.core.protocols import Automatic, Objective, Rate, Schedule, Transfers

log = logging.getLogger(__name__)

NEIGHBOURS, MIXTURE = "neighbours", "mixture"
"""The decoders that `auto` stands for with an objective that leaves datasets out: `mixture` where
adapters add up."""
ONE_PROCESS = ((1, 1), ("1", 1))
"""`trainer.devices` and `trainer.num_nodes` of a training in one process."""


@dataclass(frozen=True)
class Plan:
    """The sources of a training and its objective."""

    config: GenTrainConfig
    """The configuration, with an objective and a decoder in place of `auto`."""
    sources: list[TrainingSource]
    val_sources: list[TrainingSource]
    """Datasets for validation alone."""
    layout: Layout
    reason: str
    """Why this objective was chosen."""
    tries_mixture: bool
    """Whether the training first tries if a mixture of the other adapters makes that of a dataset,
    since `auto` then stands for the decoder `mixture`."""

    @property
    def base_model(self) -> str:
        """The base model of the adapters."""
        return self.sources[0].base_model

    @property
    def needs_base(self) -> bool:
        return any(find("objective", name).needs_base for name in self.config.training.phases)

    def summary(self) -> str:
        decoder = f"{self.config.decoder.name}: {method(self.config.decoder.name)}"
        if self.tries_mixture:
            decoder += f"; or {MIXTURE}, if it makes the adapters of left-out datasets"
        checkpoints = sum(len(source.checkpoints) for source in self.sources)
        return (
            f"{counted(len(self.sources), 'dataset')}, {counted(checkpoints, 'checkpoint')} of "
            f"{self.layout.values:,} values "
            f"-> {self.layout.tokens:,} tokens of {self.layout.token_dim} "
            f"(fill {self.layout.values / (self.layout.tokens * self.layout.token_dim):.1%})\n"
            f"objective: {self.config.training.objective} ({self.reason})\n"
            f"decoder: {decoder}"
        )


def make_plan(config: GenTrainConfig, found: Sources) -> Plan:
    """Checks that the sources fit together, derives the layout and chooses the objective.

    Raises UsageError or DataError if the sources do not fit together, UsageError if the configured
    objective cannot be trained on them.
    """
    sources, val_sources = found.training, found.validation
    both = [*sources, *val_sources]
    for source in both:
        _ = source.prompts, source.provenance  # these raise if the dataset has changed
        if not source.has_same_base(sources[0]):
            one, other = source.base_model, sources[0].base_model
            where = f"on {other}" if one != other else "on other weights of that name"
            raise DataError(
                f"{source.name} was trained on {one}, {sources[0].name} {where}: "
                "a generator serves one base model"
            )
    form = config.layout
    layout = _common_layout(sources, val_sources, form)
    # A generator's adapters have one configuration. With another alpha over rank, equal factors
    # would mean another ΔW.
    for path in dict.fromkeys(spec.path for spec in layout.tensors):
        first = module_scaling(sources[0].adapter_config, path)
        for source in both:
            scaling = module_scaling(source.adapter_config, path)
            if scaling != first:
                raise DataError(
                    f"{source.name}: ΔW is {scaling:g} · BA in {path}, and {first:g} · BA in "
                    f"{sources[0].name} (lora_alpha, rank): a generator serves one scaling"
                )
    if config.training.importance and len(sources) < 2:
        raise UsageError("training.importance compares datasets: it needs two at least")
    automatic = config.decoder.name == AUTO
    config, reason = choose_method(config, sources)
    tries_mixture = automatic and config.decoder.name == NEIGHBOURS
    if tries_mixture and (config.trainer.devices, config.trainer.num_nodes) not in ONE_PROCESS:
        # Each process would decide for itself, by answers that rounding may change.
        log.warning("decoder.name: auto does not try a mixture on several devices; name it")
        tries_mixture = False
    return Plan(config, sources, val_sources, layout, reason, tries_mixture)


def _common_layout(
    sources: Sequence[TrainingSource], val_sources: Sequence[TrainingSource], form: LayoutSection
) -> Layout:
    """Reads the last adapter of each source and returns the layout that they have in common.

    Raises DataError naming the file of an adapter that is not ΔW = BA, has NaN or infinity, does
    not fit the base or differs from the first in a tensor; and if there is nothing to learn.
    """
    layout: Layout | None = None
    zero: list[TrainingSource] = []
    equal: dict[str, list[TrainingSource]] = {}
    bases: dict[str, dict[str, torch.Size]] = {}
    for source in (*sources, *val_sources):
        last = source.checkpoints[-1]
        adapter = source.read(last)
        if source.run is None:
            warn_of_config(adapter.config, last)
            expected = bases.get(repr(adapter.config)) or _fitting_shapes(source, adapter)
            bases[repr(adapter.config)] = expected
            problem = expected and shape_mismatch(
                expected, {key: tensor.shape for key, tensor in adapter.tensors.items()}
            )
            if problem:
                raise DataError(
                    f"{last}: does not fit {source.base_model} as configured: {problem}"
                )
        if layout is None:
            layout = Layout.of(adapter.tensors, form.token_dim, form.max_seq_len)
        try:
            layout.check(adapter.tensors)
        except DataError as error:
            raise DataError(f"{last}: not the adapter of {sources[0].name}: {error}") from None
        equal.setdefault(tensors_hash(adapter.tensors), []).append(source)
        if changes_nothing(adapter.config, adapter.tensors):
            zero.append(source)
    assert layout is not None  # there is a source
    if {*sources} <= {*zero}:
        raise DataError("nothing to learn: all adapters are zero, as before a training")
    if zero:
        listed = listing([source.name for source in zero])
        log.warning("%s: the adapter is zero, as before a training", listed)
    for same in equal.values():
        if len(same) > 1 and {*sources} <= {*same}:
            raise DataError("nothing to learn: the adapters of all datasets are equal")
        if len(same) > 1:
            listed = listing([source.name for source in same])
            log.warning("%s: their adapters are equal, bit for bit", listed)
    return layout


def _fitting_shapes(source: TrainingSource, adapter: Adapter) -> dict[str, torch.Size]:
    """Returns the shapes that the tensors of an adapter, which loragen has not trained, should
    have; empty if its base is not on this machine or does not load. Raises DataError if PEFT cannot
    attach it to that base."""
    if is_gguf(source.base_model) or not is_local(source.base_model):
        return {}
    try:
        with torch.device("meta"):
            base = empty_base(source.base_model, local_files_only=True).model
    except LoragenError as error:
        log.warning("%s: not compared with its base: %s", source.directory, error)
        return {}
    try:
        with torch.device("meta"):
            return fitting_shapes(base, adapter.config)
    except LoragenError as error:
        raise DataError(
            f"{source.checkpoints[-1]}: does not fit {source.base_model}: {error}"
        ) from None


def choose_method(
    config: GenTrainConfig, sources: Sequence[TrainingSource]
) -> tuple[GenTrainConfig, str]:
    """Returns the configuration with objective and decoder in place of `auto`, and the reason.

    For the objective, `auto` is the first that can be trained; for the decoder, the one that the
    objective trains. Raises UsageError if the configured objective, or every one of `auto`, cannot
    be trained.
    """

    def obstacle(objective: str) -> str | None:
        phases = [find("objective", one) for one in phases_in(objective)]
        with_decoder = config.model_copy(update={"decoder": decoder_for(config, objective)})
        name = with_decoder.decoder.name
        transfers = issubclass(find("decoder", name), Transfers)
        if {phase.leaves_out for phase in phases} == {False, True}:
            return "the objectives train different decoders, and cannot follow each other"
        if transfers and not phases[0].leaves_out:
            return f"the decoder {name} is trained on left-out datasets (objective transfer)"
        if phases[0].leaves_out and not transfers:
            return f"the decoder {name} cannot transfer"
        found = (phase.obstacle(with_decoder, sources) for phase in phases)
        return next((problem for problem in found if problem), None)

    objective = config.training.objective
    if objective != "auto":
        if problem := obstacle(objective):
            raise UsageError(f"training.objective {objective}: {problem}")
        return with_method(config, objective), "as configured"
    refused: dict[str, str] = {}
    for automatic in automatic_objectives():
        problem = obstacle(automatic.phases)
        if problem is None:
            found = with_method(config, automatic.phases)
            others = [f"no {phases}: {why}" for phases, why in refused.items()]
            if len(set(refused.values())) == 1 < len(refused):  # the same reason for all
                return found, next(iter(refused.values()))
            return found, "; ".join([automatic.reason, *others])
        refused[automatic.phases] = problem
    raise UsageError(f"training.objective auto: {'; '.join(refused.values())}; name another one")


def decoder_for(config: GenTrainConfig, objective: str) -> PluginSection:
    """Returns the configured decoder, or for `auto` the first that an objective trains."""
    if config.decoder.name != AUTO:
        return config.decoder
    leaves_out = any(find("objective", one).leaves_out for one in phases_in(objective))
    return default_decoder(NEIGHBOURS if leaves_out else "hyperconv")


def default_decoder(name: str) -> PluginSection:
    """Returns a decoder with its default options."""
    return PluginSection(name=name, **find("decoder", name).Config().model_dump(mode="json"))


def automatic_objectives() -> list[Automatic]:
    """Returns the values that `auto` may stand for, of all installed objectives, in their order."""
    found = []
    for name in names("objective"):
        try:
            automatic: Automatic | None = find("objective", name).automatic
        except PluginError as error:
            log.warning("%s", error)
        else:
            found += [automatic] if automatic else []
    return sorted(found)


def with_method(config: GenTrainConfig, objective: str) -> GenTrainConfig:
    """Returns a copy with this objective, its decoder and the gradient clipping that it needs."""
    found = config.model_copy(deep=True)
    found.training.objective = objective
    found.decoder = decoder_for(found, objective)
    if found.trainer.gradient_clip_val is None:
        limits = [find("objective", name).gradient_clip_val for name in found.training.phases]
        found.trainer.gradient_clip_val = next((one for one in limits if one is not None), None)
    return found


@dataclass(frozen=True)
class Phase:
    """The optimizer steps of a training that minimise one objective."""

    name: str
    objective: Objective
    steps: int
    schedule: Schedule
    """The schedule of the phase, whose steps it counts from 1."""


@dataclass(frozen=True)
class Phases:
    """All optimizer steps of a training, also those that a resumed run has done already."""

    phases: Sequence[Phase]
    steps_per_epoch: int
    """Steps of reconstruction in which every checkpoint is drawn once."""

    def __iter__(self) -> Iterator[Phase]:
        return iter(self.phases)

    def __str__(self) -> str:
        return ", then ".join(f"{phase.steps} steps of {phase.name}" for phase in self.phases)

    @property
    def total(self) -> int:
        """Optimizer steps of all phases together."""
        return sum(phase.steps for phase in self.phases)

    @property
    def last(self) -> Phase:
        return self.phases[-1]

    def at(self, step: int) -> tuple[Phase, int]:
        """Returns the phase of optimizer step `step` and the step within it, both counted from 1.

        After the last step, these are the last phase and its last step.
        """
        for phase in self.phases:
            if step <= phase.steps:
                return phase, step
            step -= phase.steps
        return self.last, self.last.steps

    def rate(self, step: int) -> Rate:
        """Returns the rate of step `step`, counted from 1; LambdaLR also reads the one after the
        last."""
        phase, within = self.at(step)
        return phase.schedule(within, phase.steps)

    def epochs(self, step: int) -> float:
        """Returns how often every checkpoint is drawn in `step` steps of reconstruction."""
        return step / self.steps_per_epoch


def make_phases(config: GenTrainConfig, data: Any) -> Phases:
    """Creates the configured objectives for the `TrainingData`, with their steps and schedules."""
    limit, phases = config.trainer.limit_train_batches, []
    for name in config.training.phases:
        options = config.training.objective_options.get(name, {})
        objective: Objective = create("objective", name, options, data)
        steps = objective.steps
        if isinstance(limit, float):
            steps = ceil(steps * min(limit, 1.0))
        elif limit:  # a number of micro-batches
            steps = min(steps, ceil(limit / config.trainer.accumulate_grad_batches))
        phases.append(Phase(name, objective, steps, _schedule(config, objective.learning_rate)))
    return Phases(phases, data.pairs().steps_per_epoch)


def _schedule(config: GenTrainConfig, learning_rate: float) -> Schedule:
    """Returns the configured schedule; `learning_rate` replaces its option of that name if it has
    one, and that is left at its default."""
    options = config.schedule.options
    field = find("schedule", config.schedule.name).Config.model_fields.get("learning_rate")
    if field is not None and options.get("learning_rate", field.default) == field.default:
        options = {**options, "learning_rate": learning_rate}
    schedule: Schedule = create("schedule", config.schedule.name, options)
    return schedule
