"""Learn: collections and their prompts -> an experiment directory with a generator in it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from loragen.core.checkpoints import AtomicCheckpointIO
from loragen.core.config import GenTrainConfig
from loragen.core.errors import DataError
from loragen.core.files import sha256_text
from loragen.core.generator.familiarity import Familiarity
from loragen.core.generator.layout import Layout
from loragen.core.generator.model import Choice, Generator
from loragen.core.generator.module import GeneratorModule
from loragen.core.generator.normalization import Normalization
from loragen.core.generator.pairs import PairBatch, PairDataModule
from loragen.core.generator.sources import (
    Collection,
    PreparedSource,
    common_layout,
    prepared,
    read_sources,
)
from loragen.core.lora.callbacks import StepCallback
from loragen.core.plugins import create, find
from loragen.core.progress import Progress, Step
from loragen.core.protocols import Encoder, Schedule
from loragen.core.quiet import quiet_libraries
from loragen.core.runs import GENERATOR_FILE, GeneratorManifest, plugin_records
from loragen.core.session import RunSession, fit, make_trainer, outcome


@dataclass(frozen=True)
class GeneratorRun:
    directory: Path
    manifest: GeneratorManifest


@dataclass(frozen=True)
class Plan:
    """What training will work on, known before anything is written."""

    sources: list[Collection]
    unseen: list[Collection]
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
    sources, unseen = read_sources(config)
    for source in (*sources, *unseen):
        if source.base_model != sources[0].base_model:
            raise DataError(
                f"{source.name} was trained on {source.base_model}, {sources[0].name} on "
                f"{sources[0].base_model}: a generator serves one base model"
            )
    return Plan(sources, unseen, common_layout([*sources, *unseen], config))


def train(config: GenTrainConfig, progress: Progress) -> GeneratorRun:
    """Trains a generator on all sources; nothing is written before they are known to fit."""
    quiet_libraries()
    work = plan(config)
    encoder: Encoder = create("encoder", config.encoder.name, config.encoder.options)
    key = sha256_text(config.encoder.name, repr(config.encoder.options), encoder.fingerprint)
    both = [*work.sources, *work.unseen]
    with prepared(both, work.layout, encoder, key, config) as ready:
        seen, unseen = ready[: len(work.sources)], ready[len(work.sources) :]
        return _train(config, work, encoder, seen, unseen, progress)


def _train(
    config: GenTrainConfig,
    work: Plan,
    encoder: Encoder,
    seen: Sequence[PreparedSource],
    unseen: Sequence[PreparedSource],
    progress: Progress,
) -> GeneratorRun:
    data = PairDataModule(
        seen,
        unseen,
        batch_size=config.data.batch_size,
        prompts=config.data.prompts_per_condition,
        val_ratio=config.data.val_ratio,
        seed=config.seed,
        parts=config.trainer.accumulate_grad_batches,
    )
    generator = _new_generator(config, work, encoder, seen)
    total = _total_steps(config, data)
    module = GeneratorModule(
        generator.network,
        _schedule(config),
        generator.normalization,
        work.layout.mask(),
        config.training,
        total,
    )
    session = RunSession(
        Path(config.experiments_dir), "lora_generator", config, _manifest(config, work), progress
    )
    best = _best_checkpoint(data)
    trainer = _trainer(config, session, best, total)
    progress.start("generator", total)
    with outcome(session):
        fit(trainer, module, data)
        generator.provenance = _provenance(session, module, best, trainer.global_step)
        if best.best_model_path:
            _restore(module, Path(best.best_model_path))
        if trainer.is_global_zero:
            generator.save(session.directory / GENERATOR_FILE)
    assert isinstance(session.manifest, GeneratorManifest)
    return GeneratorRun(session.directory, session.manifest)


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
        familiarity=Familiarity.fit((one.name, one.embeddings, one.mask) for one in seen),
    )


def _schedule(config: GenTrainConfig) -> Schedule:
    """`training.learning_rate` is meant for any schedule with a `learning_rate` left at default."""
    options = config.schedule.options
    default = find("schedule", config.schedule.name).Config.model_fields.get("learning_rate")
    if default is not None and options.get("learning_rate") == default.default:
        options = {**options, "learning_rate": config.training.learning_rate}
    schedule: Schedule = create("schedule", config.schedule.name, options)
    return schedule


def _total_steps(config: GenTrainConfig, data: PairDataModule) -> int:
    """Optimizer steps, as `training` and `trainer.limit_train_batches` end them."""
    steps = config.training.max_epochs * data.train_batches().steps_per_epoch
    steps = min(steps, config.training.max_steps or steps)
    limit = config.trainer.limit_train_batches
    if isinstance(limit, float):
        return ceil(steps * min(limit, 1.0))
    return min(steps, ceil(limit / data.parts)) if limit else steps


def _best_checkpoint(data: PairDataModule) -> ModelCheckpoint:
    """Keeps the best by validation data, of held-out datasets where there are any, and the last."""
    watched = "val_unseen/loss" if data.unseen else "val/loss"
    validates = bool(data.unseen) or any(data.val_texts)
    return ModelCheckpoint(
        monitor=watched if validates else None,
        filename="epoch={epoch}-val_loss={" + watched + ":.4f}" if validates else "epoch={epoch}",
        auto_insert_metric_name=False,
        save_last=True,
        save_top_k=1,
    )


def _trainer(
    config: GenTrainConfig, session: RunSession, best: ModelCheckpoint, total: int
) -> Trainer:
    validates = best.monitor is not None
    options = config.trainer.model_dump(exclude={"limit_train_batches"})  # it is in the total
    val_batches = options.pop("limit_val_batches") or 1.0
    pairs = config.data.batch_size * config.trainer.accumulate_grad_batches
    return make_trainer(
        options,
        callbacks=[session, EpochMetrics(session, pairs), best],
        plugins=[AtomicCheckpointIO()],
        max_steps=total,
        max_epochs=config.training.max_epochs,
        enable_checkpointing=True,
        check_val_every_n_epoch=config.training.val_every_epochs,
        limit_val_batches=val_batches if validates else 0,
    )


class EpochMetrics(StepCallback):
    """Logs every optimizer step and every validation, at the true step."""

    def __init__(self, session: RunSession, pairs_per_step: int) -> None:
        self.session, self.pairs_per_step = session, pairs_per_step
        self._began = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        self._began = time.perf_counter()

    def on_step(self, trainer: Trainer, pl_module: Any, batch: PairBatch) -> None:
        step, now = trainer.global_step, time.perf_counter()
        rate, self._began = self.pairs_per_step / (now - self._began), now
        learning_rate, stage = pl_module.schedule(step, pl_module.total_steps)
        metrics = {name: float(v) for name, v in pl_module.metrics.items() if name[:6] == "train/"}
        self.session.log_metrics(
            {**metrics, "train/lr": learning_rate, "train/epoch": float(trainer.current_epoch)},
            step,
        )
        self.session.report(
            Step(step, pl_module.total_steps, stage, metrics["train/loss"], rate, "pairs/s")
        )

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val")}
        pl_module.metrics |= metrics
        self.session.log_metrics(metrics, trainer.global_step)


def _restore(module: GeneratorModule, checkpoint: Path) -> None:
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    module.load_state_dict(state)


def _manifest(config: GenTrainConfig, work: Plan) -> GeneratorManifest:
    chosen = {
        "encoder": [config.encoder.name],
        "decoder": [config.decoder.name],
        "schedule": [config.schedule.name],
        "logger": list(config.loggers),
    }
    return GeneratorManifest(
        base_model=work.sources[0].base_model,
        sources=[str(s.checkpoints[0].parent.absolute()) for s in work.sources],
        val_sources=[str(s.checkpoints[0].parent.absolute()) for s in work.unseen],
        plugins=plugin_records(chosen),
    )


def _provenance(
    session: RunSession, module: GeneratorModule, best: ModelCheckpoint, steps: int
) -> dict[str, Any]:
    """Also fills the manifest's own results."""
    manifest = session.manifest
    assert isinstance(manifest, GeneratorManifest)
    manifest.steps = steps
    manifest.metrics = {name: float(value) for name, value in module.metrics.items()}
    rule = f"lowest {best.monitor}" if best.monitor else "the last step (nothing was held out)"
    known = manifest.model_dump(mode="json", exclude={"status", "seconds", "logger_run_ids"})
    return {**known, "chosen_by": rule}
