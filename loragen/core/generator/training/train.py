"""Learn: collections and their prompts -> an experiment directory with a generator in it."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Trainer

from loragen.core.checkpoints import AtomicCheckpointIO, load_plain
from loragen.core.config import GenTrainConfig
from loragen.core.errors import UsageError
from loragen.core.files import sha256_text
from loragen.core.generator.collections.prepared import embed_ahead, prepared
from loragen.core.generator.collections.samples import CollectionSamples
from loragen.core.generator.collections.sources import read_sources
from loragen.core.generator.familiarity import Familiarity
from loragen.core.generator.model import Choice, Generator
from loragen.core.generator.network import Network, new_network
from loragen.core.generator.normalization import Normalization, importance
from loragen.core.generator.training.behaviour import rehearsal
from loragen.core.generator.training.callbacks import (
    Averaging,
    GeneratorCheckpoints,
    GeneratorMetrics,
)
from loragen.core.generator.training.data import GeneratorData
from loragen.core.generator.training.encoding import embedded
from loragen.core.generator.training.module import GeneratorModule
from loragen.core.generator.training.objectives import Behaviour, Objectives, Reconstruction
from loragen.core.generator.training.optimization import StepPlan
from loragen.core.generator.training.plan import TRAINS_ALONG, Plan, plan
from loragen.core.generator.training.record import new_manifest, provenance
from loragen.core.generator.training.resume import (
    GeneratorPoint,
    check_settings,
    check_unchanged,
    located,
    restore_weights,
    settled,
    void_later,
)
from loragen.core.generator.training.selection import Selection, select_by
from loragen.core.generator.training.transfer import KnownDatasets
from loragen.core.interrupt import Interruption
from loragen.core.manifests import GeneratorManifest
from loragen.core.plugins import create
from loragen.core.progress import Progress
from loragen.core.protocols import Encoder
from loragen.core.quiet import quiet_libraries
from loragen.core.resume import optimizer_state, restore_progress
from loragen.core.runs import GENERATOR_FILE
from loragen.core.session import RunSession, fit, make_trainer, outcome
from loragen.core.steps import StepSeeds

log = logging.getLogger(__name__)


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
        void_later(resume)
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
        config,
        manifest,
        progress,
        resume.continued() if resume else None,
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
    generator.network.transfers.train_transfer_only()
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
