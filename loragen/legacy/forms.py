"""The YAML of the scripts before loragen, and what each of its keys is called today.

Three forms: the traditional nested training_config.yaml, the flat lightning_config.yaml, and
generator_config.yaml. A file is an old one by its `signs`, keys that no file of today can have.
The tables are the mapping; `recognition` knows the form, `translation` applies the tables and does
what takes more than a new name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

GONE = object()
"""What a converter makes of a value that means the default; also, no value."""
ANYTHING = object()
"""As a harmless value in `Dropped`: whatever the old file says there, nothing is lost."""


@dataclass(frozen=True)
class Dropped:
    """A key that has no place today."""

    advice: str
    harmless: tuple[Any, ...] = (ANYTHING,)
    """The values without which nothing changes; another one is an error with the advice."""


@dataclass(frozen=True)
class Form:
    name: str
    command: str
    """Whose configuration it is: lora or gen."""
    signs: tuple[str, ...]
    moved: Mapping[str, str]
    """Old path -> today's. The value moves with all that is below it."""
    dropped: Mapping[str, Dropped]


LOGGING = {
    "logging.swanlab": "loggers.swanlab",
    "logging.tensorboard": "loggers.tensorboard",
    "swanlab": "loggers.swanlab",
}
TRAINER = {
    "training.gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "training.accumulate_grad_batches": "trainer.accumulate_grad_batches",
    "training.max_grad_norm": "trainer.gradient_clip_val",
    "training.gradient_clip_val": "trainer.gradient_clip_val",
    "training.precision": "trainer.precision",
    "training.accelerator": "trainer.accelerator",
    "training.devices": "trainer.devices",
    "training.num_nodes": "trainer.num_nodes",
    "training.strategy": "trainer.strategy",
    "training.bf16": "trainer.precision",
    "training.fp16": "trainer.precision",
    "training.seed": "seed",
}
LORA = {
    "training.per_device_train_batch_size": "training.batch_size",
    "training.stage1.steps": "schedule.stage1_steps",
    "training.stage1.learning_rate": "schedule.learning_rate_stage1",
    "training.stage2.learning_rate": "schedule.learning_rate_stage2",
    "training.stage1_steps": "schedule.stage1_steps",
    "training.learning_rate_stage1": "schedule.learning_rate_stage1",
    "training.learning_rate_stage2": "schedule.learning_rate_stage2",
    "training.output_dir": "runs_dir",
    "training.save_steps": "checkpoints.every",
    "training.max_length": "data.max_length",
    "training.max_seq_length": "data.max_length",
    "model": "base_model",
    "model.name": "base_model",
    "model.base_model": "base_model",
    "model.model_name": "base_model",
    "model.model_name_or_path": "base_model",
    "model.base_model_name_or_path": "base_model",
    "model.torch_dtype": "base_dtype",
    "model.max_length": "data.max_length",
    "model.max_seq_length": "data.max_length",
    "model_name": "base_model",
    "model_name_or_path": "base_model",
    "lora.r": "lora.rank",
    "lora.lora_alpha": "lora.alpha",
    "lora.lora_dropout": "lora.dropout",
    "data.max_seq_length": "data.max_length",
    "data.num_workers": "data.workers",
    "training.num_workers": "data.workers",
    "training.dataloader_num_workers": "data.workers",
    "data.data_dir": "data.root",
    "data.data_root": "data.root",
    "data.dataset_name": "data.dataset",
    "output_dir": "runs_dir",
    **TRAINER,
    **LOGGING,
}
GENERATOR = {
    "model.text_encoder_name": "encoder.model",
    "model.freeze_text_encoder": "encoder.frozen",
    "model.hidden_dim": "decoder.hidden_dim",
    "model.num_hyperconv_blocks": "decoder.blocks",
    "model.kernel_size": "decoder.kernel_size",
    "model.dropout": "decoder.dropout",
    "model.output_dim": "layout.token_dim",
    "model.max_seq_len": "layout.max_seq_len",
    "training.optimizer_type": "training.optimizer",
    "training.scheduler_type": "schedule.name",
    "training.batch_size": "data.batch_size",
    "experiment.output_dir": "experiments_dir",
    "experiment.seed": "seed",
    **TRAINER,
    **LOGGING,
}
EVERY_STEP = Dropped("every step is logged")
NO_WORKERS = Dropped("pairs are read in the process itself")
WARM_UP = Dropped("schedule: {name: cosine, warmup_ratio: ...} warms up", (0, 0.0, None))
BOTH = {
    "training.logging_steps": EVERY_STEP,
    "training.log_every_n_steps": EVERY_STEP,
    "logging.log_every_n_steps": EVERY_STEP,
    "logging.logging_steps": EVERY_STEP,
    "training.warmup_steps": WARM_UP,
    "training.warmup_ratio": WARM_UP,
    "data.pin_memory": Dropped("batches are not pinned"),
}
ADAMW = ("adamw", "AdamW", "adamw_torch", None)
LORA_DROPPED = {
    "training.optimizer": Dropped("LoRA trains with AdamW", ADAMW),
    "training.optimizer_type": Dropped("LoRA trains with AdamW", ADAMW),
    "training.optim": Dropped("LoRA trains with AdamW", ADAMW),
    "training.learning_rate": Dropped(
        "each stage has its own: schedule.learning_rate_stage1 and schedule.learning_rate_stage2",
        (None,),
    ),
    "lora.bias": Dropped("LoRA trains the matrices alone", ("none", None)),
    "lora.task_type": Dropped("bases are causal language models", ("CAUSAL_LM", None)),
    **BOTH,
}
GENERATOR_DROPPED = {
    "training.num_workers": NO_WORKERS,
    "training.dataloader_num_workers": NO_WORKERS,
    "data.num_workers": NO_WORKERS,
    **BOTH,
}


def _precision(value: Any) -> Any:
    names = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}
    return names.get(str(value), value)


def _flag(precision: str) -> Callable[[Any], Any]:
    """`fp16: true` is a precision, `fp16: false` the default one."""
    return lambda value: precision if value is True else GONE if value in (False, None) else value


def _options(value: Any) -> Any:
    return {} if value is None or value is True else value


def _dtype(value: Any) -> Any:
    """`torch.bfloat16` is `bfloat16`."""
    return GONE if value is None else str(value).removeprefix("torch.")


def _renamed(names: Mapping[Any, str]) -> Callable[[Any], Any]:
    """Small letters, and the name of today where there is another."""

    def rename(value: Any) -> Any:
        name = value.lower() if isinstance(value, str) else value
        return names.get(name, name) if isinstance(name, str | None) else name

    return rename


OPTIMIZERS = {"adamw_torch": "adamw", "adamw_hf": "adamw"}
SCHEDULES = {
    None: "constant",
    "none": "constant",
    "cosine_annealing": "cosine",
    "cosineannealinglr": "cosine",
    "linearlr": "linear",
    "constantlr": "constant",
}
"""What transformers, torch and scripts call them."""

CONVERTERS: Mapping[str, Callable[[Any], Any]] = {
    "model.max_seq_len": lambda value: "auto" if value == 512 else value,
    "training.optimizer_type": _renamed(OPTIMIZERS),
    "training.scheduler_type": _renamed(SCHEDULES),
    "training.precision": _precision,
    "model.torch_dtype": _dtype,
    "training.bf16": _flag("bf16-mixed"),
    "training.fp16": _flag("16-mixed"),
    "logging.swanlab": _options,
    "logging.tensorboard": _options,
    "swanlab": _options,
}
NOTES: Mapping[str, list[str]] = {
    "model.max_seq_len": ["which holds no real adapter; auto takes what it needs"]
}
SWANLAB = ("logging.swanlab", "swanlab")
STAGE2_STEPS = ("training.stage2.steps", "training.stage2_steps")
"""Today the rest of `training.max_steps`."""

TRADITIONAL = Form(
    "traditional",
    "lora",
    ("training.per_device_train_batch_size", "training.stage1", "training.stage2"),
    LORA,
    LORA_DROPPED,
)
FLAT = Form(
    "flat Lightning",
    "lora",
    (
        "training.stage1_steps",
        "training.stage2_steps",
        "training.learning_rate_stage1",
        "training.learning_rate_stage2",
    ),
    LORA,
    LORA_DROPPED,
)
ORIGINAL_GENERATOR = Form(
    "original generator",
    "gen",
    (
        "model.text_encoder_name",
        "model.freeze_text_encoder",
        "model.hidden_dim",
        "model.num_hyperconv_blocks",
        "model.output_dim",
        "model.max_seq_len",
        "training.optimizer_type",
        "training.scheduler_type",
        *SWANLAB,
    ),
    GENERATOR,
    GENERATOR_DROPPED,
)
LOGGING_ALONE = Form("flat Lightning", "lora", SWANLAB, LORA, LORA_DROPPED)
FORMS = (TRADITIONAL, FLAT, ORIGINAL_GENERATOR, LOGGING_ALONE)
