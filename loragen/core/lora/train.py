"""Trains an adapter on one dataset: the rows -> a run directory with checkpoints and the adapter.

`train_adapter` is the whole recipe: setup, fit, save.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from math import ceil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback

from loragen.core.adapter.export import (
    describe_base,
    front_matter,
    how_to_load,
    hub_datasets,
    save_merged,
)
from loragen.core.adapter.files import (
    Adapter,
    adapter_state,
    peft_config,
    plain_config,
    write_adapter,
)
from loragen.core.base.checkpointing import gradient_checkpointing
from loragen.core.base.load import (
    DTYPES,
    PRECISION_DTYPES,
    LanguageModel,
    dtype_name,
    empty_base,
    free_memory,
    load_training_base,
    trainer_precision,
)
from loragen.core.config import LoraTrainConfig
from loragen.core.data.chat import chat_date, pad_id
from loragen.core.data.dataset import Dataset
from loragen.core.errors import Interrupted, UsageError, first_line, listing
from loragen.core.files import written_atomically
from loragen.core.lora.data import LoraDataModule, TrainingRows, load_rows
from loragen.core.lora.module import LoraModule, StepCheckpoints, StepMetrics
from loragen.core.lora.provenance import Provenance
from loragen.core.lora.tasks import IGNORED_ON_RESUME, with_absolute_paths
from loragen.core.plugins import create
from loragen.core.progress import Progress, is_first_process
from loragen.core.run.checkpoints import AtomicCheckpointIO
from loragen.core.run.directory import (
    LoraManifest,
    LoraRun,
    Run,
    checkpoint_step,
    environment_record,
    plugin_records,
)
from loragen.core.run.loop import Interruption, RunSession, StepSeeds, Trial, fit, make_trainer
from loragen.core.run.metrics import METRICS, read_metrics
from loragen.core.run.resume import ResumePoint

log = logging.getLogger(__name__)


def train_adapter(
    config: LoraTrainConfig,
    dataset: Dataset,
    base: LanguageModel,
    progress: Progress,
    resume: "LoraPoint | None" = None,
    validation: Dataset | None = None,
    on_start: Callable[[Path], None] | None = None,
    trial: Trial | None = None,
) -> LoraRun:
    """Trains one adapter, or resumes a run; `base` is unchanged afterwards.

    `validation` is `config.data.validation`, if that is open already; `on_start` is called with
    the run directory once it has its manifest; `trial` is that of a sweep. Nothing is written
    before data, tokens and adapter are checked. Raises DataError for bad rows, UsageError if the
    adapter does not fit the base or the run cannot be resumed, Interrupted on Ctrl+C, once the step
    is saved, and what the trial raises.
    """
    from peft.helpers import disable_input_dtype_casting

    # ---- setup: rows, manifest, adapter
    if resume and is_first_process():
        resume.acquire()
    config = with_absolute_paths(config)
    training = config.training
    if config.checkpoints.first_step > training.max_steps:
        log.warning(
            "checkpoints.first_step is %d and training.max_steps %d: only the last step is kept",
            config.checkpoints.first_step,
            training.max_steps,
        )
    recorded, date = (resume.manifest.dataset.tokens, resume.date) if resume else ("", "")
    rows = load_rows(config, dataset, base.tokenizer, validation, recorded, date)
    manifest = LoraManifest(
        base_model=config.base_model,
        base_dtype=dtype_name(base.model.dtype),
        base_fingerprint=base.fingerprint,
        trust_remote_code=base.trust_remote_code,
        chat_date=chat_date(base.tokenizer),
        chat_template_kwargs=config.chat_template_kwargs,
        dataset=rows.record,
        adapter_config={},  # known once PEFT has found the target modules in the base
        seed=config.seed,
        max_steps=training.max_steps,
        environment=environment_record(),
        plugins=plugin_records(
            {"schedule": [config.schedule.name], "logger": list(config.loggers)}
        ),
    )
    if resume:
        resume.check(config, manifest)
    bound = config.lora.rank * sum(map(sum, _matrices(base.model)))  # as if it adapted all of them
    if training_bytes(config, bound, bound) > free_memory(config.trainer.accelerator):
        check_memory(config, *count_values(config)[:2])
    model = new_adapter(base, config)
    try:
        manifest.adapter_config = plain_config(model.peft_config["default"])

        # ---- setup: session, trainer, module
        session = RunSession(
            Path(config.runs_dir),
            f"{dataset.name}_lora",
            dataset.name,
            config,
            manifest,
            progress,
            resume,
            trial,
        )
        interruption = Interruption()
        trainer = _new_trainer(config, base, session, manifest, rows, interruption, on_start)
        data = LoraDataModule(rows, config, pad_id(base.tokenizer))
        data.check_divisible(trainer.world_size, trainer.accumulate_grad_batches)
        mixed = "mixed" in trainer_precision(config, base.model)
        module = LoraModule(
            model,
            create("schedule", config.schedule.name, config.schedule.options),
            max_steps=training.max_steps,
            weight_decay=training.weight_decay,
            # Lightning clips no gradients of a fused optimizer in mixed precision.
            fused=not (config.trainer.gradient_clip_val and mixed),
        )
        if resume:
            resume.restore(trainer, module)

        # ---- fit and save
        progress.training_started(dataset.name, training.max_steps)
        memory: AbstractContextManager[Any] = (
            gradient_checkpointing(model) if training.gradient_checkpointing else nullcontext()
        )
        # PEFT would widen every input to the adapter's float32, and autocast narrow it again.
        casts = disable_input_dtype_casting(model, active=mixed)
        with memory, casts, session, interruption.handle_signals():
            fit(trainer, module, data)
            if trainer.is_global_zero:
                _save_results(config, base, model, manifest, session.directory, trainer.global_step)
    finally:
        plain = model.unload()
        # Back to the CPU, except for a quantised base, which stays on the GPU.
        base.model = plain if getattr(plain, "is_quantized", False) else plain.to("cpu")
    if interruption.requested:  # after the last step; no further dataset is to be trained
        raise Interrupted(f"interrupted; {session.directory} is finished nevertheless")
    return Run(session.directory, manifest)


def _new_trainer(
    config: LoraTrainConfig,
    base: LanguageModel,
    session: RunSession,
    manifest: LoraManifest,
    rows: TrainingRows,
    interruption: Interruption,
    on_start: Callable[[Path], None] | None,
) -> Any:
    """Returns the Lightning trainer of a run, with its callbacks in the order of their calls."""
    training, validates = config.training, bool(rows.validation)
    val_every = min(training.val_every, training.max_steps) if validates else None
    provenance = Provenance(rows.training.rows, training.batch_size, config.seed)
    callbacks: list[Any] = [session]
    if on_start:
        callbacks.append(LambdaCallback(setup=lambda *_, **__: on_start(session.directory)))
    callbacks += [
        StepSeeds(config.seed),
        StepMetrics(session, manifest, provenance if config.track_batches else None),
    ]
    if training.patience and val_every:
        patience = ceil(training.patience / val_every)
        callbacks.append(EarlyStopping("val/loss", patience=patience))
    callbacks.append(
        StepCheckpoints(session, interruption, manifest, config.checkpoints, val_every)
    )
    # limit_train_batches is left to our data module, which also counts the steps before a resume.
    options = config.trainer.model_dump(exclude={"limit_train_batches"})
    options["precision"] = trainer_precision(config, base.model)
    limit_val_batches = options.pop("limit_val_batches") or 1.0
    accumulation = config.trainer.accumulate_grad_batches
    return make_trainer(
        options,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        max_steps=training.max_steps,
        max_epochs=1,  # the loader yields all steps, however many epochs of the rows they are
        check_val_every_n_epoch=None,  # val_check_interval counts all batches, resumed or not
        val_check_interval=val_every * accumulation if val_every else None,
        limit_val_batches=limit_val_batches if validates else 0,
    )


def _save_results(
    config: LoraTrainConfig,
    base: LanguageModel,
    model: Any,
    manifest: LoraManifest,
    run: Path,
    step: int,
) -> None:
    """Writes adapter/ and, if the configuration asks for it, final_model/."""
    lineage = manifest.lineage(step, run.name)
    card = (
        f"{front_matter(config.base_model, datasets=hub_datasets(lineage))}\n# {run.name}\n\n"
        f"A LoRA adapter trained by `loragen lora train` (rank {config.lora.rank}, "
        f"{config.training.max_steps} steps, seed {config.seed}) for "
        f"{describe_base(config.base_model)}.\n\n"
        f"{how_to_load(config.base_model, kwargs=config.chat_template_kwargs)}"
    )
    adapter = Adapter(
        manifest.adapter_config,
        adapter_state(model),
        chat_template_kwargs=config.chat_template_kwargs,
        lineage=lineage,
    )
    write_adapter(run / "adapter", adapter, card)
    if config.base_quantization != "none":
        log.warning("no final_model/: the base is quantised; use `loragen lora export --merge`")
    elif config.final_model == "merged":
        with written_atomically(run / "final_model") as temporary:
            save_merged(model, base, temporary)


# ---------------------------------------------------------------------------- the adapter


def new_adapter(base: LanguageModel, config: LoraTrainConfig) -> Any:
    """Returns a `PeftModel` whose LoRA has the same initial weights for every dataset.

    Raises UsageError if target_modules names nothing of the base, or if no matrix of the base has
    such a rank.
    """
    from peft import get_peft_model, prepare_model_for_kbit_training

    matrices = _matrices(base.model)
    most = max(map(min, matrices), default=config.lora.rank)
    if config.lora.rank > most:
        values = config.lora.rank * sum(map(sum, matrices))
        raise UsageError(
            f"lora.rank {config.lora.rank}: no matrix of the base has a rank above {most}; the "
            f"adapter would take up to {training_bytes(config, values, values) / 1e9:,.1f} GB of "
            "memory for nothing"
        )
    if config.base_quantization != "none":
        prepare_model_for_kbit_training(base.model, False)  # type: ignore[no-untyped-call]  # PEFT is untyped
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        try:
            model = get_peft_model(base.model, peft_config(config.lora))
        except ValueError as error:
            reason = first_line(error).partition(" Please ")[0]
            layers = (n for n, m in base.model.named_modules() if isinstance(m, torch.nn.Linear))
            names = sorted({name.rpartition(".")[2] for name in layers})
            raise UsageError(
                f"lora.target_modules: {reason} Its linear layers: {listing(names)}"
            ) from None
    # PEFT accepts a list if one of its names is found; a misspelt one would shrink the adapter.
    targets, found = config.lora.target_modules, model.base_model.targeted_module_names
    missing = [
        name
        for name in (targets if isinstance(targets, list) else ())
        if not any(module == name or module.endswith(f".{name}") for module in found)
    ]
    if missing:
        known = sorted({module.rpartition(".")[2] for module in found})
        model.unload()
        raise UsageError(
            f"lora.target_modules: {listing(missing)} not found in the base, only {listing(known)}"
        )
    if config.lora.freeze_a:
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(False)
    # The name that the user gave: PEFT would record the path from which the weights were loaded.
    model.peft_config["default"].base_model_name_or_path = config.base_model
    return model


def _matrices(model: Any) -> list[tuple[int, int]]:
    """Returns the two sizes of each matrix that an adapter may adapt."""
    found = []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):  # the weight of a quantised one has another shape
            found.append((module.in_features, module.out_features))
        elif (weight := getattr(module, "weight", None)) is not None and weight.ndim == 2:
            found.append((weight.shape[0], weight.shape[1]))
    return found


def training_bytes(config: LoraTrainConfig, values: int, trained: int) -> int:
    """Returns the memory that an adapter takes in training: its values, and the gradients and both
    moments of AdamW of those that train. The base and activations are not counted."""
    return _width(config) * (values + 3 * trained)


def _width(config: LoraTrainConfig) -> int:
    """Returns the bytes of an adapter's value in training."""
    return DTYPES[PRECISION_DTYPES.get(config.trainer.precision, "float32")].itemsize


def check_memory(config: LoraTrainConfig, values: int, trained: int) -> None:
    """Raises UsageError if an adapter of so many values is too large for the memory that is free:
    the system would end the process without a word."""
    needed, free = training_bytes(config, values, trained), free_memory(config.trainer.accelerator)
    if needed > free:
        raise UsageError(
            f"lora.rank {config.lora.rank}: the adapter has {values:,} values, whose training "
            f"takes {needed / 1e9:,.1f} GB of memory, and {free / 1e9:,.1f} GB are free; lower "
            "lora.rank, or adapt fewer lora.target_modules"
        )


def count_values(config: LoraTrainConfig) -> tuple[int, int, int]:
    """Returns the number of values of an adapter, of those that train, and of the base's
    parameters, without loading weights.

    Raises UsageError if target_modules names nothing of the base.
    """
    with torch.device("meta"):
        model = new_adapter(
            empty_base(config.base_model, trust_remote_code=config.trust_remote_code), config
        )
    adapter = [p for name, p in model.named_parameters() if "lora_" in name]
    values = sum(p.numel() for p in adapter)
    trained = sum(p.numel() for p in adapter if p.requires_grad)
    return values, trained, sum(p.numel() for p in model.parameters()) - values


def checkpoint_sizes(config: LoraTrainConfig, values: int, trained: int) -> list[int]:
    """Returns the size (bytes) of the tensors in each checkpoint that a run keeps, in the order of
    steps, for an adapter of so many `values`, of which `trained` train."""
    settings, last = config.checkpoints, config.training.max_steps
    width = _width(config)
    moments = 2  # of AdamW, each as large as the adapter
    return [
        width * (values + moments * trained * settings.carries_optimizer(final=step == last))
        for step in range(1, last + 1)
        if settings.keeps(step, final=step == last)
    ]


# ---------------------------------------------------------------------------- resuming


class LoraPoint(ResumePoint[LoraManifest, LoraTrainConfig]):
    """A run of `lora train`, and the checkpoint from which it resumes."""

    kind, ignored_on_resume = LoraManifest, IGNORED_ON_RESUME

    @property
    def date(self) -> str:
        """The date that the chat template has written: that of the run's beginning, where an older
        manifest does not have it."""
        return self.manifest.chat_date or self.manifest.started

    def changed_inputs(self, config: LoraTrainConfig, manifest: LoraManifest) -> list[str]:
        recorded, (then, now) = self.manifest, (self.manifest.dataset, manifest.dataset)
        problems = []
        if then.sha256 not in ("", now.sha256):
            problems.append(f"the data differ: {now.path} is not the {then.path} of the run")
        # If settings differ, other rows may be drawn: then the settings are what is wrong.
        elif then.tokens not in ("", now.tokens) and not self.differences(config):
            problems.append(
                "the tokens of the rows differ: another tokenizer, chat template or loragen"
            )
        if then.validation != now.validation:
            problems.append("the validation rows differ (data.validation)")
        if recorded.base_fingerprint not in ("", manifest.base_fingerprint):
            problems.append(
                f"the weights of the base model differ: {config.base_model}, "
                f"the run was on {recorded.base_model}"
            )
        if recorded.base_dtype not in ("", manifest.base_dtype):
            problems.append(
                f"the base computes in {manifest.base_dtype}, the run's in {recorded.base_dtype}"
            )
        return problems

    def continue_manifest(self, manifest: LoraManifest) -> None:
        super().continue_manifest(manifest)
        file = self.directory / METRICS
        entries = read_metrics(file) if file.is_file() else []
        losses = [e["train/loss"] for e in entries if e["step"] == self.step and "train/loss" in e]
        manifest.final_loss = losses[-1] if losses else None
        steps = map(checkpoint_step, self.checkpoints)  # the manifest of a killed run lacks them
        manifest.steps = [step for step in steps if step <= self.step]


def load_resumed_base(point: LoraPoint, config: LoraTrainConfig) -> LanguageModel:
    """Loads the base in the dtype of the run, because `auto` may choose another one here."""
    dtype = point.manifest.base_dtype or config.base_dtype
    return load_training_base(config.model_copy(update={"base_dtype": dtype}))
