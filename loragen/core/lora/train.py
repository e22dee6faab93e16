"""Collect: one dataset -> a run directory with a checkpoint per step of stage 2."""

import logging
from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import EarlyStopping

from loragen.core.adapters import Adapter, file_keys, plain_config, write_adapter
from loragen.core.base_models import BaseModel
from loragen.core.checkpoints import AtomicCheckpointIO
from loragen.core.config import LoraTrainConfig
from loragen.core.data.documents import Source
from loragen.core.data.tokenize import pad_id
from loragen.core.files import written_atomically
from loragen.core.interrupt import Interrupted, Interruption
from loragen.core.lora.attach import new_adapter
from loragen.core.lora.callbacks import StepCheckpoints, StepMetrics
from loragen.core.lora.data import LoraDataModule, Rows, load_rows
from loragen.core.lora.identity import located
from loragen.core.lora.merge import save_merged
from loragen.core.lora.module import LoraModule
from loragen.core.lora.precision import arithmetic, dtype_name
from loragen.core.lora.provenance import Provenance
from loragen.core.lora.resume import (
    LoraPoint,
    check_unchanged,
    logged_loss,
    restore_adapter,
    void_later,
)
from loragen.core.manifests import LoraManifest, plugin_records
from loragen.core.plugins import create
from loragen.core.progress import Progress
from loragen.core.resume import optimizer_state, restore_progress
from loragen.core.runs import LoraRun, checkpoint_files, checkpoint_step
from loragen.core.session import RunSession, fit, make_trainer, outcome
from loragen.core.steps import StepSeeds

log = logging.getLogger(__name__)


def train(
    config: LoraTrainConfig,
    name: str,
    source: Source,
    base: BaseModel,
    progress: Progress,
    resume: LoraPoint | None = None,
) -> LoraRun:
    """Trains one adapter, or goes on with a run; the base is handed back as it was.

    Nothing is written before data, tokens and adapter are known to be good. Raises DataError for
    bad rows, UsageError where the adapter does not fit the base or the run cannot go on,
    Interrupted on Ctrl+C, once the step is saved.
    """
    config = located(config)
    _warn_of_missing_stages(config)
    rows = load_rows(config, name, source, base.tokenizer)
    if resume:
        check_unchanged(resume, config, rows, base)
    model = new_adapter(base, config)
    try:
        return _trained(config, rows, base, model, progress, resume)
    finally:
        base.model = _handed_back(model)


def _trained(
    config: LoraTrainConfig,
    rows: Rows,
    base: BaseModel,
    model: Any,
    progress: Progress,
    resume: LoraPoint | None,
) -> LoraRun:
    name = rows.record.name
    manifest = _manifest(config, rows, base, model, resume)
    session = RunSession(
        Path(config.runs_dir),
        f"{name}_lora",
        config,
        manifest,
        progress,
        resume.continued() if resume else None,
    )
    interruption = Interruption()
    trainer = _trainer(config, base, session, rows, interruption)
    data = _data(config, rows, base)
    data.check_shared(trainer.world_size, trainer.accumulate_grad_batches)
    checkpoint = resume.read() if resume else None
    if checkpoint:
        restore_adapter(model, checkpoint)
        restore_progress(trainer, checkpoint)
    if resume and trainer.is_global_zero:
        void_later(resume)
    progress.start(name, config.training.max_steps)
    with outcome(session), interruption.awaited():
        fit(trainer, _module(config, model, checkpoint), data)
        if trainer.is_global_zero:
            _save_results(session.directory, config, base, model)
    if interruption.requested:  # after the last step: a collection is not to go on
        raise Interrupted(f"interrupted; {session.directory} was finished all the same")
    return LoraRun(session.directory, manifest)


def _data(config: LoraTrainConfig, rows: Rows, base: BaseModel) -> LoraDataModule:
    return LoraDataModule(
        rows,
        batch_size=config.training.batch_size,
        max_steps=config.training.max_steps,
        seed=config.seed,
        pad_id=pad_id(base.tokenizer),
        packing=config.training.packing,
        workers=config.data.workers,
        limit=config.trainer.limit_train_batches,
    )


def _module(
    config: LoraTrainConfig, model: Any, checkpoint: Mapping[str, Any] | None
) -> LoraModule:
    return LoraModule(
        model,
        create("schedule", config.schedule.name, config.schedule.options),
        max_steps=config.training.max_steps,
        weight_decay=config.training.weight_decay,
        # Lightning clips no gradients of a fused optimizer in mixed precision.
        fused=not (config.trainer.gradient_clip_val and "mixed" in arithmetic(config, model)),
        first_step=int(checkpoint["global_step"]) if checkpoint else 0,
        optimizer_state=optimizer_state(checkpoint) if checkpoint else None,
    )


def _handed_back(model: Any) -> Any:
    """The base without the adapter; on the CPU again, unless it is quantised and lives on a GPU."""
    base = model.unload()
    return base if getattr(base, "is_quantized", False) else base.to("cpu")


def _save_results(directory: Path, config: LoraTrainConfig, base: BaseModel, model: Any) -> None:
    adapter = Adapter(plain_config(model.peft_config["default"]), file_keys(model.state_dict()))
    write_adapter(directory / "adapter", adapter, _card(config, directory.name))
    if config.base_quantization != "none":
        log.warning("no final_model/: the base is quantised; see `loragen lora export --merge`")
    elif config.final_model == "merged":
        with written_atomically(directory / "final_model") as temporary:
            save_merged(model, base, temporary)


def _trainer(
    config: LoraTrainConfig,
    base: BaseModel,
    session: RunSession,
    rows: Rows,
    interruption: Interruption,
) -> Any:
    training, validates = config.training, bool(rows.validation)
    every = min(training.val_every, training.max_steps) if validates else None
    provenance = Provenance(rows.training_rows, training.batch_size, config.seed)
    callbacks: list[Any] = [
        session,
        StepSeeds(config.seed),
        StepMetrics(session, provenance if config.track_batches else None),
    ]
    if training.patience and every:
        callbacks.append(EarlyStopping("val/loss", patience=ceil(training.patience / every)))
    callbacks.append(StepCheckpoints(session, config.checkpoints, every, interruption))
    options = config.trainer.model_dump(exclude={"limit_train_batches"})  # ours counts resumed
    options["precision"] = arithmetic(config, base.model)
    val_batches = options.pop("limit_val_batches") or 1.0
    return make_trainer(
        options,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        max_steps=training.max_steps,
        max_epochs=1,  # one walk through the steps, however often the rows come round
        check_val_every_n_epoch=None,  # val_check_interval counts all batches, resumed or not
        val_check_interval=every * config.trainer.accumulate_grad_batches if every else None,
        limit_val_batches=val_batches if validates else 0,
    )


def _manifest(
    config: LoraTrainConfig,
    rows: Rows,
    base: BaseModel,
    model: Any,
    resume: LoraPoint | None,
) -> LoraManifest:
    manifest = LoraManifest(
        base_model=config.base_model,
        base_dtype=dtype_name(base.model.dtype),
        base_fingerprint=base.fingerprint,
        dataset=rows.record,
        adapter_config=plain_config(model.peft_config["default"]),
        seed=config.seed,
        max_steps=config.training.max_steps,
        plugins=plugin_records(
            {"schedule": [config.schedule.name], "logger": list(config.loggers)}
        ),
    )
    if resume:
        manifest.started = resume.manifest.started
        manifest.final_loss = logged_loss(resume)
        steps = map(checkpoint_step, checkpoint_files(resume.directory))  # a kill wrote no manifest
        manifest.steps = [step for step in steps if step <= resume.step]
        manifest.resumed_from = [*resume.manifest.resumed_from, resume.step]
    return manifest


def _warn_of_missing_stages(config: LoraTrainConfig) -> None:
    first, last = config.checkpoints.first_step, config.training.max_steps
    if first > last:
        log.warning(
            "checkpoints.first_step is %d and training.max_steps %d: only the last step is kept",
            first,
            last,
        )


def _card(config: LoraTrainConfig, run: str) -> str:
    return (
        f"---\nbase_model: {config.base_model}\nlibrary_name: peft\ntags: [lora, loragen]\n---\n\n"
        f"# {run}\n\nA LoRA adapter trained by `loragen lora train` "
        f"(rank {config.lora.rank}, {config.training.max_steps} steps, seed {config.seed}).\n"
    )
