"""Collect: one dataset -> a run directory with a checkpoint per step of stage 2."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import EarlyStopping

from loragen.core.adapters import Adapter, file_keys, plain_config, write_adapter
from loragen.core.base_models import BaseModel
from loragen.core.checkpoints import AtomicCheckpointIO
from loragen.core.config import LoraTrainConfig
from loragen.core.data.batches import held_out
from loragen.core.data.documents import Source, content_hash, location
from loragen.core.data.rows import BadRow, Row, read_rows, refuse_bad, warn_of_bad
from loragen.core.data.tokenize import Example, example, pad_id
from loragen.core.errors import DataError, UsageError
from loragen.core.files import written_atomically
from loragen.core.lora.callbacks import StepCheckpoints, StepMetrics, StepSeeds
from loragen.core.lora.data import LoraDataModule
from loragen.core.lora.module import LoraModule
from loragen.core.plugins import create
from loragen.core.progress import Progress
from loragen.core.runs import DatasetRecord, LoraManifest, plugin_records
from loragen.core.session import RunSession, fit, make_trainer, outcome

log = logging.getLogger(__name__)

DTYPES = {"bf16-true": torch.bfloat16, "64-true": torch.float64}


@dataclass(frozen=True)
class LoraRun:
    """What came out of one dataset."""

    directory: Path
    manifest: LoraManifest


def base_dtype(config: LoraTrainConfig) -> torch.dtype:
    """float32, unless the precision says that the weights themselves are in another."""
    return DTYPES.get(config.trainer.precision, torch.float32)


def train(
    config: LoraTrainConfig, name: str, file: Source, base: BaseModel, progress: Progress
) -> LoraRun:
    """Trains one adapter; the base is handed back as it was.

    Nothing is written before data, tokens and adapter are known to be good. Raises DataError for
    bad rows, UsageError where the adapter does not fit the base.
    """
    _warn_of_missing_stages(config)
    data, record = load_data(config, name, file, base.tokenizer)
    model = new_adapter(base.model, config)
    try:
        session = RunSession(
            Path(config.runs_dir),
            f"{name}_lora",
            config,
            _manifest(config, record, model),
            progress,
        )
        module = LoraModule(
            model,
            create("schedule", config.schedule.name, config.schedule.options),
            max_steps=config.training.max_steps,
            weight_decay=config.training.weight_decay,
            fused=config.trainer.precision != "16-mixed",  # its scaler cannot clip a fused step
            keeps_optimizer=config.checkpoints.optimizer,
        )
        trainer = _trainer(config, session, bool(data.validation))
        progress.start(name, config.training.max_steps)
        with outcome(session):
            fit(trainer, module, data)
            if trainer.is_global_zero:
                _save_results(session.directory, config, base, model)
    finally:
        base.model = model.unload().to("cpu")
    assert isinstance(session.manifest, LoraManifest)
    return LoraRun(session.directory, session.manifest)


def load_data(
    config: LoraTrainConfig, name: str, file: Source, tokenizer: Any
) -> tuple[LoraDataModule, DatasetRecord]:
    """The tokenised rows of a file, with the held-out ones apart."""
    rows, examples, too_long = fitting(
        tokenizer, read_rows(file, config.data.skip_bad_rows), config.data.max_length
    )
    refuse_bad(file, too_long, len(rows), config.data.skip_bad_rows)
    warn_of_bad(file, too_long, len(rows))
    training, validation = held_out(len(rows), config.data.val_ratio, config.seed)
    if not training:
        raise DataError(f"{file}: data.val_ratio leaves no rows to train on ({len(rows)} in all)")
    data = LoraDataModule(
        _picked(examples, training),
        _picked(examples, validation),
        batch_size=config.training.batch_size,
        max_steps=config.training.max_steps,
        seed=config.seed,
        pad_id=pad_id(tokenizer),
    )
    record = DatasetRecord(
        name=name, path=location(file), sha256=content_hash(file), rows=len(rows)
    )
    return data, record


def fitting(
    tokenizer: Any, rows: Sequence[Row], max_length: int
) -> tuple[list[Row], list[Example], list[BadRow]]:
    """The rows whose answer fits, their tokens, and the others."""
    kept, examples, too_long = [], [], []
    for row in rows:
        try:
            examples.append(example(tokenizer, row, max_length))
            kept.append(row)
        except DataError as error:
            too_long.append(BadRow(row.line, str(error)))
    return kept, examples, too_long


def new_adapter(base: Any, config: LoraTrainConfig) -> Any:
    """A PeftModel whose LoRA starts from the same weights for every dataset of a collection.

    Raises UsageError where target_modules names nothing of the base.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    lora = LoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,  # type: ignore[arg-type]  # PEFT divides it, any number does
        lora_dropout=config.lora.dropout,
        target_modules=config.lora.target_modules,
        task_type=TaskType.CAUSAL_LM,
    )
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        try:
            model = get_peft_model(base, lora)
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise UsageError(f"lora.target_modules: {reason}") from None
    # As the user named it: PEFT would put in the path the weights were loaded from.
    model.peft_config["default"].base_model_name_or_path = config.base_model
    return model


def merged_state(model: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The base's state dict with ΔW = alpha / rank · B A added, in `dtype`; `model` is unchanged.

    (peft's merge changes the base in place, and unmerging does not give it back exactly.)
    """
    deltas = {
        f"{name}.base_layer.weight": layer.get_delta_weight("default")
        for name, layer in model.get_base_model().named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    state = {}
    for key, value in model.get_base_model().state_dict().items():
        if "lora_" not in key:
            merged = value + deltas[key].to(value) if key in deltas else value
            state[key.replace(".base_layer.", ".")] = merged.to(dtype).cpu()
    return state


def _save_results(directory: Path, config: LoraTrainConfig, base: BaseModel, model: Any) -> None:
    adapter = Adapter(plain_config(model.peft_config["default"]), file_keys(model.state_dict()))
    write_adapter(directory / "adapter", adapter, _card(config, directory.name))
    if config.final_model == "merged":
        with written_atomically(directory / "final_model") as temporary:
            save_merged(model, base, temporary)


def save_merged(model: Any, base: BaseModel, directory: Path) -> None:
    """A Hugging Face model directory in the base's stored dtype, tokenizer included."""
    plain = model.get_base_model()
    kept = plain.config.dtype
    plain.save_pretrained(directory, state_dict=merged_state(model, base.dtype))
    plain.config.dtype = base.dtype  # save_pretrained writes what the model in memory has
    try:
        plain.config.save_pretrained(directory)
    finally:
        plain.config.dtype = kept
    base.tokenizer.save_pretrained(directory)


def _trainer(config: LoraTrainConfig, session: RunSession, validates: bool) -> Any:
    training, checkpoints = config.training, config.checkpoints
    callbacks: list[Any] = [
        session,
        StepSeeds(config.seed),
        StepMetrics(session),
        StepCheckpoints(session, checkpoints.first_step, checkpoints.every),
    ]
    if training.patience:
        checks = ceil(training.patience / training.val_every)
        callbacks.append(EarlyStopping("val/loss", patience=checks))
    every = min(training.val_every, training.max_steps) * config.trainer.accumulate_grad_batches
    return make_trainer(
        config.trainer.model_dump(),
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        max_steps=training.max_steps,
        val_check_interval=every if validates else None,
        limit_val_batches=1.0 if validates else 0,
    )


def _manifest(config: LoraTrainConfig, record: DatasetRecord, model: Any) -> LoraManifest:
    return LoraManifest(
        base_model=config.base_model,
        dataset=record,
        adapter_config=plain_config(model.peft_config["default"]),
        seed=config.seed,
        max_steps=config.training.max_steps,
        plugins=plugin_records(
            {"schedule": [config.schedule.name], "logger": list(config.loggers)}
        ),
    )


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


def _picked(examples: list[Example], indices: list[int]) -> list[Example]:
    return [examples[index] for index in indices]
