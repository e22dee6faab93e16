"""Going on with the training of a generator: what has to be the same, and what becomes void.

What a run of generator training says of itself: its manifest, and its generator's provenance.

Learn: collections and their prompts -> an experiment directory with a generator in it.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from torch import nn

from loragen.core.base.load import dtype_name, quiet_libraries
from loragen.core.config import GenTrainConfig
from loragen.core.config.schema import SourceSection
from loragen.core.config.show import HARDWARE
from loragen.core.data.documents import location, parsed_source
from loragen.core.errors import DataError, UsageError
from loragen.core.files import sha256_text, user_path
from loragen.core.generator.embeddings import Familiarity
from loragen.core.generator.model import Choice, Generator
from loragen.core.generator.network import Network, Normalization, importance, new_network
from loragen.core.learning.arrays import CollectionSamples, embed_ahead, embedded, prepared
from loragen.core.learning.data import GeneratorData, rehearsal
from loragen.core.learning.module import (
    Averaging,
    GeneratorCheckpoints,
    GeneratorMetrics,
    GeneratorModule,
)
from loragen.core.learning.objectives.behaviour import Behaviour, Objectives, Reconstruction
from loragen.core.learning.objectives.transfer import KnownDatasets
from loragen.core.learning.plan import TRAINS_ALONG, Plan, Selection, StepPlan, plan, select_by
from loragen.core.learning.sources import configured_sources, read_sources
from loragen.core.plugins import create, find
from loragen.core.progress import Progress
from loragen.core.protocols import Encoder
from loragen.core.run.checkpoints import AtomicCheckpointIO, load_plain
from loragen.core.run.directory import (
    GENERATOR_FILE,
    GeneratorManifest,
    SourceRecord,
    plugin_records,
)
from loragen.core.run.loop import Interruption, RunSession, StepSeeds, fit, make_trainer, outcome
from loragen.core.run.resume import (
    ResumePoint,
    optimizer_state,
    restore_progress,
)

log = logging.getLogger(__name__)

FREE = (
    "experiments_dir",
    "loggers",
    # What the sources hold is compared by hash, wherever it lies.
    "sources",
    "val_sources",
    "data.checkpoint_dir",
    "data.prompts",
    "data.cache_tokenized",
    "data.cache_dir",
    "training.last_every",
    *HARDWARE,
)


class GeneratorPoint(ResumePoint[GeneratorManifest, GenTrainConfig]):
    """A run of `gen train`, and the checkpoint from which it resumes."""

    kind, free = GeneratorManifest, FREE

    def differences(self, config: GenTrainConfig) -> list[str]:
        return super().differences(settled(self, config))


def find_resume_point(path: Path) -> GeneratorPoint:
    """Deprecated: `GeneratorPoint.find`."""
    return GeneratorPoint.find(path)


def nothing_left(point: GeneratorPoint, config: GenTrainConfig) -> bool:
    """Deprecated: `GeneratorPoint.is_finished`."""
    return point.is_finished(config)


def settled(point: GeneratorPoint, config: GenTrainConfig) -> GenTrainConfig:
    """With the objective that `auto` had come to: what else is on this machine may have changed."""
    asked = config.training.objective
    return config.with_objective(point.config.training.objective if asked == "auto" else asked)


def check_settings(point: GeneratorPoint, config: GenTrainConfig) -> None:
    """Deprecated: `GeneratorPoint.check_settings`."""
    point.check_settings(config)


def check_unchanged(
    point: GeneratorPoint, config: GenTrainConfig, manifest: GeneratorManifest
) -> None:
    """Raises UsageError naming every difference between the run and what would resume it."""
    then = point.manifest
    problems = []
    if then.encoder_fingerprint not in ("", manifest.encoder_fingerprint):
        problems.append(f"the encoder {config.encoder.name} has other weights")
    if then.base_fingerprint not in ("", manifest.base_fingerprint):
        problems.append("the base model has other weights")
    if then.source_records:
        problems += _other_sources(then.source_records, manifest.source_records)
    point.check_unchanged(config, problems)


def located(config: GenTrainConfig) -> GenTrainConfig:
    """With the sources that were found, by their absolute places: a run is gone on with from other
    directories, and learns from what it began with, whatever has come to a folder of runs since."""
    found = config.model_copy(deep=True)
    found.sources = [_located(source) for source in configured_sources(config)]
    found.val_sources = [_located(source) for source in config.val_sources]
    found.data.checkpoint_dir = None
    base = found.behaviour.base_model
    if base and user_path(base).is_dir():
        found.behaviour.base_model = str(user_path(base).absolute())
    if config.data.prompts is not None:
        found.data.prompts = str(Path(config.data.prompts).absolute())
    return found


def _located(source: SourceSection) -> SourceSection:
    """With absolute paths."""
    places = {
        key: str(Path(place).absolute())
        for key, place in (("run", source.run), ("checkpoints", source.checkpoints))
        if place is not None
    }
    if source.prompts is not None:
        places["prompts"] = location(parsed_source(source.prompts))
    return source.model_copy(update=places)


def restore_weights(module: nn.Module, document: dict[str, Any]) -> None:
    """Raises DataError where the checkpoint's tensors are not exactly the module's."""
    try:
        module.load_state_dict(document["state_dict"])
    except (RuntimeError, KeyError) as error:
        raise DataError("the checkpoint's tensors are not those of this generator") from error


def _other_sources(then: list[SourceRecord], now: list[SourceRecord]) -> list[str]:
    names = [[(one.name, one.held_out) for one in records] for records in (then, now)]
    if names[0] != names[1]:
        told = [", ".join(name for name, _ in one) for one in names]
        return [f"the sources are {told[1]}, the run has {told[0]} (order and roles count)"]
    problems = []
    for old, new in zip(then, now, strict=True):
        if old.checkpoints != new.checkpoints:
            problems.append(f"{new.name} has other checkpoints")
        if old.prompts != new.prompts:
            problems.append(f"{new.name} has other prompts")
        if old.labels not in ("", new.labels):
            problems.append(f"{new.name} has other labelled rows, or they make other tokens")
    return problems


def new_manifest(
    work: Plan, data: GeneratorData, encoder: Encoder, resume: GeneratorPoint | None
) -> GeneratorManifest:
    """Of a run that begins, or goes on with what `resume` has of it."""
    config, base = data.config, data.rehearsal.base if data.rehearsal else None
    chosen = {
        "encoder": [config.encoder.name],
        "decoder": [config.decoder.name],
        "schedule": [config.schedule.name],
        "logger": list(config.loggers),
    }
    manifest = GeneratorManifest(
        base_model=work.base_model,
        sources=[str(s.checkpoints[0].parent.absolute()) for s in work.sources],
        val_sources=[str(s.checkpoints[0].parent.absolute()) for s in work.unseen],
        base_fingerprint=base.fingerprint if base else "",
        base_dtype=dtype_name(base.model.dtype) if base else "",
        source_records=_source_records(data),
        encoder_fingerprint=encoder.fingerprint,
        plugins=plugin_records(chosen),
    )
    if resume:
        manifest.started = resume.manifest.started
        manifest.resumed_from = [*resume.manifest.resumed_from, resume.step]
    return manifest


def provenance(
    manifest: GeneratorManifest, selection: Selection, steps: StepPlan
) -> dict[str, Any]:
    """What the generator's file tells of its training."""
    known = manifest.model_dump(mode="json", exclude={"status", "seconds", "logger_run_ids"})
    return {**known, "trained_for": str(steps.phases), "chosen_by": selection.sentence}


def _source_records(data: GeneratorData) -> list[SourceRecord]:
    tried = data.rehearsal
    known = [*tried.rows, *tried.unseen] if tried else [None] * len(data.both)
    return [
        source.record.model_copy(
            update={"held_out": place >= len(data.sources), "labels": rows.sha256 if rows else ""}
        )
        for place, (source, rows) in enumerate(zip(data.both, known, strict=True))
        if source.record
    ]


@dataclass(frozen=True)
class GeneratorRun:
    directory: Path
    manifest: GeneratorManifest


def train(
    config: GenTrainConfig, progress: Progress, resume: GeneratorPoint | None = None
) -> GeneratorRun:
    """Trains a generator on all sources, or goes on with a run.

    Nothing is written before the sources are known to fit. Raises UsageError or DataError for
    sources or settings that do not, UsageError where the run cannot go on, Interrupted on Ctrl+C,
    once the step is saved.
    """
    quiet_libraries()
    if resume:
        config = settled(resume, config)
        check_settings(resume, config)
    work = plan(config)
    log.info("%s; reading checkpoints and prompts", work.summary())
    config = located(work.config)
    tried = rehearsal(work, resume.manifest.base_dtype if resume else "")
    encoder, key = _encoder(config)
    if config.training.objective == "transfer" and not encoder.frozen:
        raise UsageError(f"training.objective transfer: {TRAINS_ALONG}; choose another objective")
    both = [*work.sources, *work.unseen]
    with prepared(both, work.layout, encoder, key, config) as ready:
        seen, unseen = ready[: len(work.sources)], ready[len(work.sources) :]
        data = GeneratorData(seen, unseen, config, tried)
        return _train(work, data, encoder, progress, resume)


def read_ahead(config: GenTrainConfig) -> None:
    """Embeds the prompts of the sources that are there by now, where a training on these and others
    finds them. Raises UsageError or DataError for sources that do not fit."""
    embed_ahead(read_sources(config)[0], *_encoder(config), config)


def _encoder(config: GenTrainConfig) -> tuple[Encoder, str]:
    """And a hash of all that decides its embeddings."""
    encoder: Encoder = create("encoder", config.encoder.name, config.encoder.options)
    described = config.encoder.name, repr(config.encoder.options)
    return encoder, sha256_text(*described, encoder.fingerprint)


def _train(
    work: Plan,
    data: GeneratorData,
    encoder: Encoder,
    progress: Progress,
    resume: GeneratorPoint | None,
) -> GeneratorRun:
    manifest = new_manifest(work, data, encoder, resume)
    if resume:
        check_unchanged(resume, data.config, manifest)
    checkpoint = resume.read() if resume else None
    generator = _new_generator(data, work, encoder)
    module = _module(data, generator, encoder, checkpoint)
    walk = _walk(data, generator, manifest, progress, resume)
    data.check_shared(walk.trainer.world_size)
    if checkpoint:
        restore_weights(module, checkpoint)
        restore_progress(walk.trainer, checkpoint)
        del checkpoint  # several times the weights
    if resume and walk.trainer.is_global_zero:
        resume.delete_later_checkpoints()
    log.info("%s", data.plan.phases)
    progress.start("generator", data.plan.total)
    with outcome(walk.session), walk.interruption.awaited():
        fit(walk.trainer, module, data)
        manifest.steps, manifest.metrics = walk.trainer.global_step, walk.metrics.latest
        generator.provenance = provenance(manifest, walk.selection, data.plan)
        if walk.checkpoints.best:
            restore_weights(module, load_plain(walk.checkpoints.best))
        _keep(generator, module, data)
        if walk.trainer.is_global_zero:
            generator.save(walk.session.directory / GENERATOR_FILE)
    return GeneratorRun(walk.session.directory, manifest)


@dataclass(frozen=True)
class Walk:
    """A trainer and what goes along with it from the first step to the last."""

    session: RunSession
    metrics: GeneratorMetrics
    checkpoints: GeneratorCheckpoints
    selection: Selection
    interruption: Interruption
    trainer: Trainer


def _walk(
    data: GeneratorData,
    generator: Generator,
    manifest: GeneratorManifest,
    progress: Progress,
    resume: GeneratorPoint | None,
) -> Walk:
    config, steps = data.config, data.plan
    session = RunSession(
        Path(config.experiments_dir),
        "lora_generator",
        "generator",
        config,
        manifest,
        progress,
        resume,
    )
    interruption = Interruption()
    selection = select_by(any(data.val_texts), bool(data.unseen), data.tries_rows)
    every = min(config.training.val_every_epochs * steps.per_epoch, steps.total)
    val_every = every if data.validates else None
    generator.provenance = provenance(manifest, selection, steps)
    metrics = GeneratorMetrics(session, steps, data.adapters_per_step)
    checkpoints = GeneratorCheckpoints(
        session,
        generator,
        selection,
        steps,
        interruption,
        val_every=val_every,
        last_every=config.training.last_every,
    )
    callbacks = [session, StepSeeds(config.seed), Averaging(), metrics, checkpoints]
    trainer = _trainer(config, callbacks, steps, val_every)
    return Walk(session, metrics, checkpoints, selection, interruption, trainer)


def _trainer(
    config: GenTrainConfig, callbacks: list[Any], steps: StepPlan, val_every: int | None
) -> Trainer:
    options = config.trainer.model_dump(exclude={"limit_train_batches"})  # it is in the plan
    val_batches = options.pop("limit_val_batches") or 1.0
    parts = config.trainer.accumulate_grad_batches
    return make_trainer(
        options,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        max_steps=steps.total,
        max_epochs=1,  # one walk through the steps; epochs are counted by the plan
        check_val_every_n_epoch=None,  # val_check_interval counts all batches, resumed or not
        val_check_interval=val_every * parts if val_every else None,
        limit_val_batches=val_batches if val_every else 0,
    )


def _module(
    data: GeneratorData, generator: Generator, encoder: Encoder, checkpoint: dict[str, Any] | None
) -> GeneratorModule:
    return GeneratorModule(
        generator.network,
        data.plan,
        _objectives(data, generator),
        data.config.training,
        encoder=None if encoder.frozen else encoder,
        first_step=int(checkpoint["global_step"]) if checkpoint else 0,
        optimizer_state=optimizer_state(checkpoint) if checkpoint else None,
    )


def _objectives(data: GeneratorData, generator: Generator) -> Objectives:
    layout, normalization, training = (
        generator.layout,
        generator.normalization,
        data.config.training,
    )
    collections = [source.tokens for source in data.sources]
    weights = (
        importance(layout, normalization, collections)
        if training.importance
        else torch.ones(layout.tokens, 1)
    )
    behaviour = None
    if data.rehearsal:
        base = data.rehearsal.base
        behaviour = Behaviour(base, layout, normalization, generator.adapter_config)
    return Objectives(
        Reconstruction(normalization, layout.mask(), training, weights),
        behaviour,
        data.config.behaviour.reconstruction_weight,
        _known(data, generator),
    )


def _known(data: GeneratorData, generator: Generator) -> KnownDatasets | None:
    """For the transfer objective, whose decoder then trains nothing else."""
    if not data.plan.transfers:
        return None
    samples = CollectionSamples([one.tokens for one in data.sources], generator.normalization)
    cls = find("decoder", generator.decoder.name)
    prefixes = cls.transfer_parameters(cls.Config(**generator.decoder.options))
    generator.network.train_transfer_only(prefixes)
    return KnownDatasets(data.sources, data.train_texts, samples)


def _new_generator(data: GeneratorData, work: Plan, encoder: Encoder) -> Generator:
    config, layout = data.config, work.layout
    collections = [source.tokens for source in data.sources]
    normalization = Normalization.fit(layout, collections)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        network = new_network(config.decoder.name, config.decoder.options, encoder.dim, layout)
        network.start_from(CollectionSamples(collections, normalization))
    network.fit_conditions((texts, mask) for _, texts, mask in embedded(encoder, data.sources))
    return Generator(
        encoder=Choice(config.encoder.name, config.encoder.options),
        encoder_fingerprint=encoder.fingerprint,
        decoder=Choice(config.decoder.name, config.decoder.options),
        condition_dim=encoder.dim,
        layout=layout,
        normalization=normalization,
        adapter_config=work.sources[0].adapter_config,
        base_model=work.base_model,
        samples_per_prompt=config.data.samples_per_prompt,
        prompts_per_condition=config.data.prompts_per_condition,
        network=network,
        familiarity=Familiarity.fit(embedded(encoder, data.sources)),
    )


def _keep(generator: Generator, module: GeneratorModule, data: GeneratorData) -> None:
    """What the training has made of the weights, averaged or not."""
    kept = module.kept.eval().float()  # whatever the training computed in
    generator.network = cast(Network, kept["network"])
    if "encoder" in kept:
        encoder: Any = kept["encoder"]
        generator.encoder_state = encoder.state_dict()
        generator.encoder_fingerprint = encoder.fingerprint
        generator.familiarity = Familiarity.fit(embedded(encoder, data.sources))
