"""Learn: collections and their prompts -> an experiment directory with a generator in it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from loragen.core.checkpoints import AtomicCheckpointIO, load_plain
from loragen.core.config import GenTrainConfig
from loragen.core.errors import DataError
from loragen.core.files import sha256_text
from loragen.core.generator.callbacks import GeneratorCheckpoints, GeneratorMetrics
from loragen.core.generator.layout import Layout
from loragen.core.generator.model import Choice, Generator
from loragen.core.generator.module import GeneratorModule
from loragen.core.generator.normalization import Normalization
from loragen.core.generator.optimization import StepPlan, step_plan
from loragen.core.generator.pairs import PairDataModule
from loragen.core.generator.places import configured_sources
from loragen.core.generator.resume import (
    GeneratorPoint,
    check_settings,
    check_unchanged,
    located,
    restore_weights,
    void_later,
)
from loragen.core.generator.selection import Selection, select_by
from loragen.core.generator.sources import (
    PreparedSource,
    Source,
    common_layout,
    prepared,
    read_source,
)
from loragen.core.interrupt import Interruption
from loragen.core.plugins import create
from loragen.core.progress import Progress
from loragen.core.protocols import Encoder
from loragen.core.quiet import quiet_libraries
from loragen.core.resume import optimizer_state, restore_progress
from loragen.core.runs import GENERATOR_FILE, GeneratorManifest, plugin_records
from loragen.core.session import RunSession, fit, make_trainer, outcome
from loragen.core.steps import StepSeeds


@dataclass(frozen=True)
class GeneratorRun:
    directory: Path
    manifest: GeneratorManifest


@dataclass(frozen=True)
class Plan:
    """What training will work on, known before anything is written."""

    sources: list[Source]
    unseen: list[Source]
    layout: Layout

    def summary(self) -> str:
        checkpoints = sum(len(source.checkpoints) for source in self.sources)
        return (
            f"{len(self.sources)} datasets, {checkpoints} checkpoints of {self.layout.values:,} "
            f"values -> {self.layout.tokens:,} tokens of {self.layout.token_dim} "
            f"(fill {self.layout.values / (self.layout.tokens * self.layout.token_dim):.1%})"
        )


def plan(config: GenTrainConfig) -> Plan:
    """Finds every source and derives the layout. Raises UsageError or DataError."""
    limit = config.data.max_checkpoints
    sources = [read_source(source, limit) for source in configured_sources(config)]
    unseen = [read_source(source, limit) for source in config.val_sources]
    for source in (*sources, *unseen):
        if source.base_model != sources[0].base_model:
            raise DataError(
                f"{source.name} was trained on {source.base_model}, {sources[0].name} on "
                f"{sources[0].base_model}: a generator serves one base model"
            )
    return Plan(sources, unseen, common_layout([*sources, *unseen], config))


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
        check_settings(resume, config)
    work = plan(config)
    encoder: Encoder = create("encoder", config.encoder.name, config.encoder.options)
    key = sha256_text(config.encoder.name, repr(config.encoder.options), encoder.fingerprint)
    both = [*work.sources, *work.unseen]
    with prepared(both, work.layout, encoder, key, config) as ready:
        seen, unseen = ready[: len(work.sources)], ready[len(work.sources) :]
        return _train(located(config), work, encoder, seen, unseen, progress, resume)


def _train(
    config: GenTrainConfig,
    work: Plan,
    encoder: Encoder,
    seen: Sequence[PreparedSource],
    unseen: Sequence[PreparedSource],
    progress: Progress,
    resume: GeneratorPoint | None,
) -> GeneratorRun:
    manifest = _manifest(config, work, encoder, seen, unseen, resume)
    if resume:
        check_unchanged(resume, config, manifest)
    checkpoint = resume.read() if resume else None
    data = _data(config, seen, unseen)
    steps = step_plan(config, data.train_batches().steps_per_epoch)
    generator = _new_generator(config, work, encoder, seen)
    module = _module(config, generator, steps, checkpoint)
    walk = _walk(config, data, steps, manifest, progress, resume)
    if checkpoint:
        restore_weights(module, checkpoint)
        restore_progress(walk.trainer, checkpoint)
    if resume and walk.trainer.is_global_zero:
        void_later(resume)
    progress.start("generator", steps.total)
    with outcome(walk.session), walk.interruption.awaited():
        fit(walk.trainer, module, data)
        manifest.steps, manifest.metrics = walk.trainer.global_step, walk.metrics.latest
        generator.provenance = _provenance(manifest, walk.selection)
        if walk.checkpoints.best:
            restore_weights(module, load_plain(walk.checkpoints.best))
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
    config: GenTrainConfig,
    data: PairDataModule,
    steps: StepPlan,
    manifest: GeneratorManifest,
    progress: Progress,
    resume: GeneratorPoint | None,
) -> Walk:
    session = RunSession(
        Path(config.experiments_dir),
        "lora_generator",
        config,
        manifest,
        progress,
        resume.continued() if resume else None,
    )
    interruption = Interruption()
    selection = select_by(seen=any(data.val_texts), unseen=bool(data.unseen))
    every = min(config.training.val_every_epochs * steps.per_epoch, steps.total)
    val_every = every if data.validates else None
    metrics = GeneratorMetrics(session, steps, data.batch_size * data.parts)
    checkpoints = GeneratorCheckpoints(
        session,
        selection,
        steps,
        interruption,
        val_every=val_every,
        last_every=config.training.last_every,
    )
    callbacks = [session, StepSeeds(config.seed), metrics, checkpoints]
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


def _data(
    config: GenTrainConfig, seen: Sequence[PreparedSource], unseen: Sequence[PreparedSource]
) -> PairDataModule:
    return PairDataModule(
        seen,
        unseen,
        batch_size=config.data.batch_size,
        prompts=config.data.prompts_per_condition,
        val_ratio=config.data.val_ratio,
        seed=config.seed,
        parts=config.trainer.accumulate_grad_batches,
    )


def _module(
    config: GenTrainConfig,
    generator: Generator,
    steps: StepPlan,
    checkpoint: dict[str, Any] | None,
) -> GeneratorModule:
    return GeneratorModule(
        generator.network,
        steps,
        generator.normalization,
        generator.layout.mask(),
        config.training,
        first_step=int(checkpoint["global_step"]) if checkpoint else 0,
        optimizer_state=optimizer_state(checkpoint) if checkpoint else None,
    )


def _new_generator(
    config: GenTrainConfig, work: Plan, encoder: Encoder, seen: Sequence[PreparedSource]
) -> Generator:
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        network = create(
            "decoder", config.decoder.name, config.decoder.options, encoder.dim, work.layout.grid()
        )
    return Generator(
        encoder=Choice(config.encoder.name, config.encoder.options),
        encoder_fingerprint=encoder.fingerprint,
        decoder=Choice(config.decoder.name, config.decoder.options),
        condition_dim=encoder.dim,
        layout=work.layout,
        normalization=Normalization.fit(work.layout, (source.tokens for source in seen)),
        adapter_config=work.sources[0].adapter_config,
        base_model=work.sources[0].base_model,
        samples_per_prompt=config.data.samples_per_prompt,
        prompts_per_condition=config.data.prompts_per_condition,
        network=network,
    )


def _manifest(
    config: GenTrainConfig,
    work: Plan,
    encoder: Encoder,
    seen: Sequence[PreparedSource],
    unseen: Sequence[PreparedSource],
    resume: GeneratorPoint | None,
) -> GeneratorManifest:
    chosen = {
        "encoder": [config.encoder.name],
        "decoder": [config.decoder.name],
        "schedule": [config.schedule.name],
        "logger": list(config.loggers),
    }
    records = [
        source.record.model_copy(update={"held_out": held_out})
        for sources, held_out in ((seen, False), (unseen, True))
        for source in sources
        if source.record
    ]
    manifest = GeneratorManifest(
        base_model=work.sources[0].base_model,
        sources=[str(s.checkpoints[0].parent.absolute()) for s in work.sources],
        val_sources=[str(s.checkpoints[0].parent.absolute()) for s in work.unseen],
        source_records=records,
        encoder_fingerprint=encoder.fingerprint,
        plugins=plugin_records(chosen),
    )
    if resume:
        manifest.started = resume.manifest.started
        manifest.resumed_from = [*resume.manifest.resumed_from, resume.step]
    return manifest


def _provenance(manifest: GeneratorManifest, selection: Selection) -> dict[str, Any]:
    """What the generator's file tells of its training."""
    known = manifest.model_dump(mode="json", exclude={"status", "seconds", "logger_run_ids"})
    return {**known, "chosen_by": selection.sentence}
