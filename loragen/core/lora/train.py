"""A LoRA with its first weights on a base model, and what it will weigh, before there is one.

Going on with a run of LoRA training: what has to be the same, and what becomes void.

Collect: one dataset -> a run directory with a checkpoint per step of stage 2.
"""

import logging
from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import EarlyStopping

from loragen.core.adapter.export import save_merged
from loragen.core.adapter.files import (
    Adapter,
    adapter_state,
    peft_config,
    plain_config,
    write_adapter,
)
from loragen.core.base.load import (
    LanguageModel,
    arithmetic,
    dtype_name,
    empty_base,
    load_training_base,
)
from loragen.core.config import LoraTrainConfig
from loragen.core.data.documents import Source
from loragen.core.data.tokenize import pad_id
from loragen.core.errors import DataError, Interrupted, UsageError, listing
from loragen.core.files import written_atomically
from loragen.core.lora.data import LoraDataModule, Rows, load_rows
from loragen.core.lora.module import LoraModule, StepCheckpoints, StepMetrics
from loragen.core.lora.provenance import Provenance
from loragen.core.lora.settings import FREE, located
from loragen.core.plugins import create
from loragen.core.progress import Progress
from loragen.core.run.checkpoints import AtomicCheckpointIO
from loragen.core.run.directory import (
    LoraManifest,
    LoraRun,
    checkpoint_files,
    checkpoint_step,
    plugin_records,
)
from loragen.core.run.loggers import METRICS, read_metrics
from loragen.core.run.loop import Interruption, RunSession, StepSeeds, fit, make_trainer, outcome
from loragen.core.run.resume import (
    ResumePoint,
    optimizer_state,
    restore_progress,
)

log = logging.getLogger(__name__)


def new_adapter(base: LanguageModel, config: LoraTrainConfig) -> Any:
    """A PeftModel whose LoRA starts from the same weights for every dataset of a collection.

    Raises UsageError where target_modules names nothing of the base.
    """
    from peft import get_peft_model, prepare_model_for_kbit_training

    if config.base_quantization != "none":
        prepare_model_for_kbit_training(base.model, False)  # type: ignore[no-untyped-call]  # theirs
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        try:
            model = get_peft_model(base.model, peft_config(config.lora))
        except ValueError as error:
            reason = str(error).splitlines()[0].partition(" Please ")[0]
            raise UsageError(
                f"lora.target_modules: {reason} Its linear layers: {listing(_linear(base.model))}"
            ) from None
    _require_all_found(model, config.lora.target_modules)
    # As the user named it: PEFT would put in the path the weights were loaded from.
    model.peft_config["default"].base_model_name_or_path = config.base_model
    return model


def _linear(model: torch.nn.Module) -> list[str]:
    layers = (n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear))
    return sorted({name.rpartition(".")[2] for name in layers})


def _require_all_found(model: Any, wanted: str | list[str]) -> None:
    """PEFT is content with one name of a list that it finds; a misspelt one would only make the
    adapter smaller."""
    found = model.base_model.targeted_module_names
    missing = [
        name
        for name in (wanted if isinstance(wanted, list) else ())
        if not any(module == name or module.endswith(f".{name}") for module in found)
    ]
    if missing:
        known = sorted({module.rpartition(".")[2] for module in found})
        model.unload()
        raise UsageError(
            f"lora.target_modules: {listing(missing)} not found in the base, only {listing(known)}"
        )


def count_values(config: LoraTrainConfig) -> int:
    """The trainable values of an adapter, without the weights of the base in memory.

    Raises UsageError where target_modules names nothing of the base.
    """
    with torch.device("meta"):
        model = new_adapter(empty_base(config.base_model), config)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def checkpoint_sizes(config: LoraTrainConfig, values: int) -> list[int]:
    """The bytes of the tensors in each checkpoint that a run keeps, in the order of steps."""
    kept, last = config.checkpoints, config.training.max_steps
    width = {"bf16-true": 2, "64-true": 8}.get(config.trainer.precision, 4)
    moments = 2  # AdamW's, each as large as the adapter
    return [
        values * width * (1 + moments * kept.carries_optimizer(final=step == last))
        for step in range(1, last + 1)
        if kept.keeps(step, final=step == last)
    ]


class LoraPoint(ResumePoint[LoraManifest, LoraTrainConfig]):
    """A run of `lora train`, and the checkpoint from which it resumes."""

    kind, free = LoraManifest, FREE


def find_resume_point(path: Path) -> LoraPoint:
    """Deprecated: `LoraPoint.find`."""
    return LoraPoint.find(path)


def nothing_left(point: LoraPoint, config: LoraTrainConfig) -> bool:
    """Deprecated: `LoraPoint.is_finished`."""
    return point.is_finished(config)


def load_base_again(point: LoraPoint, config: LoraTrainConfig) -> LanguageModel:
    """The base, in what it computed in before: here `auto` might choose another dtype."""
    dtype = point.manifest.base_dtype or config.base_dtype
    return load_training_base(config.model_copy(update={"base_dtype": dtype}))


def check_settings(point: LoraPoint, config: LoraTrainConfig) -> None:
    """Deprecated: `LoraPoint.check_settings`."""
    point.check_settings(config)


def check_unchanged(
    point: LoraPoint, config: LoraTrainConfig, rows: Rows, base: LanguageModel
) -> None:
    """Raises UsageError naming every difference between the run and what would resume it."""
    then, now = point.manifest.dataset, rows.record
    problems = []
    if then.sha256 not in ("", now.sha256):
        problems.append(f"the data are other data: {now.path} is not the {then.path} of the run")
    elif then.tokens not in ("", now.tokens):
        problems.append("the rows make other tokens: another tokenizer or chat template")
    if then.validation != now.validation:
        problems.append("the validation rows are others (data.validation)")
    if point.manifest.base_fingerprint not in ("", base.fingerprint):
        problems.append(
            f"the base model has other weights: {config.base_model}, "
            f"the run was on {point.manifest.base_model}"
        )
    dtype = dtype_name(base.model.dtype)
    if point.manifest.base_dtype not in ("", dtype):
        problems.append(f"the base computes in {dtype}, the run's in {point.manifest.base_dtype}")
    point.check_unchanged(config, problems)


def restore_adapter(model: Any, document: Mapping[str, Any]) -> None:
    """Raises DataError where the checkpoint's tensors are not exactly the adapter's."""
    state = {key.removeprefix("model."): value for key, value in document["state_dict"].items()}
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    if wanted != state.keys():
        raise DataError("the checkpoint's tensors are not those of the run's adapter")
    model.load_state_dict(state, strict=False)


def logged_loss(point: LoraPoint) -> float | None:
    """The loss of the step that the run goes on after."""
    file = point.directory / METRICS
    entries = read_metrics(file) if file.is_file() else []
    losses = [e["train/loss"] for e in entries if e["step"] == point.step and "train/loss" in e]
    return losses[-1] if losses else None


def train(
    config: LoraTrainConfig,
    name: str,
    source: Source,
    base: LanguageModel,
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
    base: LanguageModel,
    model: Any,
    progress: Progress,
    resume: LoraPoint | None,
) -> LoraRun:
    name = rows.record.name
    manifest = _manifest(config, rows, base, model, resume)
    session = RunSession(
        Path(config.runs_dir),
        f"{name}_lora",
        name,
        config,
        manifest,
        progress,
        resume,
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
        resume.delete_later_checkpoints()
    progress.start(name, config.training.max_steps)
    with outcome(session), interruption.awaited():
        fit(trainer, _module(config, model, checkpoint), data)
        if trainer.is_global_zero:
            _save_results(session.directory, config, base, model)
    if interruption.requested:  # after the last step: a collection is not to go on
        raise Interrupted(f"interrupted; {session.directory} was finished all the same")
    return LoraRun(session.directory, manifest)


def _data(config: LoraTrainConfig, rows: Rows, base: LanguageModel) -> LoraDataModule:
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


def _save_results(
    directory: Path, config: LoraTrainConfig, base: LanguageModel, model: Any
) -> None:
    adapter = Adapter(plain_config(model.peft_config["default"]), adapter_state(model))
    write_adapter(directory / "adapter", adapter, _card(config, directory.name))
    if config.base_quantization != "none":
        log.warning("no final_model/: the base is quantised; see `loragen lora export --merge`")
    elif config.final_model == "merged":
        with written_atomically(directory / "final_model") as temporary:
            save_merged(model, base, temporary)


def _trainer(
    config: LoraTrainConfig,
    base: LanguageModel,
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
    base: LanguageModel,
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
