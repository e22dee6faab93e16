"""The YAML formats of the original scripts, as tables of their keys and the current names.

There are three: the nested training_config.yaml ("traditional"), lightning_config.yaml ("flat
Lightning") and generator_config.yaml ("original generator"). `translate` detects the format of a
file, applies these tables, and does what takes more than a new name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

ABSENT = object()
"""A sentinel: the key is absent, or a converted value equals the default."""
ANY_VALUE = object()
"""A sentinel in `RemovedKey.ignored_values`: every value may be ignored."""


@dataclass(frozen=True)
class RemovedKey:
    """A key without a counterpart in a current configuration."""

    reason: str
    ignored_values: tuple[Any, ...] = (ANY_VALUE,)
    """Values that can be ignored; any other value is an error that states the reason."""


@dataclass(frozen=True)
class LegacyFormat:
    """One format: its distinctive keys, and the current counterparts of its keys."""

    name: str
    command: str
    """The command whose configuration it is: lora or gen."""
    distinctive_keys: tuple[str, ...]
    """Keys that no current file of that command can have; one of them identifies the format."""
    renamed: Mapping[str, str]
    """Old key -> current key. The value moves with everything below it."""
    removed: Mapping[str, RemovedKey]


def _by_old_key(old_keys: Mapping[str, str]) -> dict[str, str]:
    """Returns `{"a": "seed", "b": "seed"}` for `{"seed": "a b"}`."""
    return {old: current for current, text in old_keys.items() for old in text.split()}


# Current key -> the old keys for it, separated by spaces.
LOGGERS = {
    "loggers.swanlab": "logging.swanlab swanlab",
    "loggers.tensorboard": "logging.tensorboard",
}
TRAINER = {
    "trainer.accumulate_grad_batches": """training.gradient_accumulation_steps
        training.accumulate_grad_batches""",
    "trainer.gradient_clip_val": "training.max_grad_norm training.gradient_clip_val",
    "trainer.precision": "training.precision training.bf16 training.fp16",
    "trainer.accelerator": "training.accelerator",
    "trainer.devices": "training.devices",
    "trainer.num_nodes": "training.num_nodes",
    "trainer.strategy": "training.strategy",
}
LORA_RENAMED = _by_old_key(
    {
        "training.batch_size": "training.per_device_train_batch_size",
        "schedule.stage1_steps": "training.stage1.steps training.stage1_steps",
        "schedule.learning_rate_stage1": """training.stage1.learning_rate
            training.learning_rate_stage1""",
        "schedule.learning_rate_stage2": """training.stage2.learning_rate
            training.learning_rate_stage2""",
        "checkpoints.every": "training.save_steps",
        "base_model": """model model.name model.base_model model.model_name
            model.model_name_or_path model.base_model_name_or_path model_name
            model_name_or_path""",
        "base_dtype": "model.torch_dtype",
        "lora.rank": "lora.r",
        "lora.alpha": "lora.lora_alpha",
        "lora.dropout": "lora.lora_dropout",
        "data.max_length": """training.max_length training.max_seq_length model.max_length
            model.max_seq_length data.max_seq_length""",
        "data.workers": """data.num_workers training.num_workers
            training.dataloader_num_workers""",
        "data.root": "data.data_dir data.data_root",
        "data.dataset": "data.dataset_name",
        "runs_dir": "training.output_dir output_dir",
        "seed": "training.seed",
        **TRAINER,
        **LOGGERS,
    }
)
GENERATOR_RENAMED = _by_old_key(
    {
        "encoder.model": "model.text_encoder_name",
        "encoder.frozen": "model.freeze_text_encoder",
        "decoder.hidden_dim": "model.hidden_dim",
        "decoder.blocks": "model.num_hyperconv_blocks",
        "decoder.kernel_size": "model.kernel_size",
        "decoder.dropout": "model.dropout",
        "layout.token_dim": "model.output_dim",
        "layout.max_seq_len": "model.max_seq_len",
        "training.optimizer": "training.optimizer_type",
        "schedule.name": "training.scheduler_type",
        "data.batch_size": "training.batch_size",
        "experiments_dir": "experiment.output_dir",
        "seed": "experiment.seed training.seed",
        **TRAINER,
        **LOGGERS,
    }
)
STAGE2_STEPS = ("training.stage2.steps", "training.stage2_steps")
"""Keys without a current one: stage 2 has the steps of `training.max_steps` after stage 1."""

EVERY_STEP = RemovedKey("every step is logged")
WARM_UP = RemovedKey("schedule: {name: cosine, warmup_ratio: ...} warms up", (0, 0.0, None))
ADAMW = RemovedKey("LoRA trains with AdamW", ("adamw", "AdamW", "adamw_torch", None))
NO_WORKERS = RemovedKey("pairs are read in the training process itself")
BOTH_REMOVED = {
    "training.logging_steps": EVERY_STEP,
    "training.log_every_n_steps": EVERY_STEP,
    "logging.log_every_n_steps": EVERY_STEP,
    "logging.logging_steps": EVERY_STEP,
    "training.warmup_steps": WARM_UP,
    "training.warmup_ratio": WARM_UP,
    "data.pin_memory": RemovedKey("batches are not pinned"),
}
LORA_REMOVED = {
    "training.optimizer": ADAMW,
    "training.optimizer_type": ADAMW,
    "training.optim": ADAMW,
    "training.learning_rate": RemovedKey(
        "each stage has its own: schedule.learning_rate_stage1 and schedule.learning_rate_stage2",
        (None,),
    ),
    "lora.bias": RemovedKey("LoRA trains the matrices alone", ("none", None)),
    "lora.task_type": RemovedKey("bases are causal language models", ("CAUSAL_LM", None)),
    **BOTH_REMOVED,
}
GENERATOR_REMOVED = {
    "training.num_workers": NO_WORKERS,
    "training.dataloader_num_workers": NO_WORKERS,
    "data.num_workers": NO_WORKERS,
    **BOTH_REMOVED,
}

# Names in transformers, torch and the scripts.
OPTIMIZERS = {"adamw_torch": "adamw", "adamw_hf": "adamw"}
SCHEDULES = {
    None: "constant",
    "none": "constant",
    "cosine_annealing": "cosine",
    "cosineannealinglr": "cosine",
    "linearlr": "linear",
    "constantlr": "constant",
}
PRECISIONS = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}


def _renamed_in(names: Mapping[Any, str]) -> Callable[[Any], Any]:
    """Returns a converter to lower case and, if there is one, to the current name."""

    def rename(value: Any) -> Any:
        name = value.lower() if isinstance(value, str) else value
        return names.get(name, name) if isinstance(name, str | None) else name

    return rename


def _switch(precision: str) -> Callable[[Any], Any]:
    """Returns a converter of `fp16: true` to a precision, and of `fp16: false` to the default."""
    return lambda value: precision if value is True else ABSENT if value in (False, None) else value


def _logger_options(value: Any) -> Any:
    return {} if value is None or value is True else value


CONVERTERS: Mapping[str, Callable[[Any], Any]] = {
    "model.max_seq_len": lambda value: "auto" if value == 512 else value,
    "model.torch_dtype": lambda value: (
        ABSENT if value is None else str(value).removeprefix("torch.")
    ),
    "training.optimizer_type": _renamed_in(OPTIMIZERS),
    "training.scheduler_type": _renamed_in(SCHEDULES),
    "training.precision": lambda value: PRECISIONS.get(str(value), value),
    "training.bf16": _switch("bf16-mixed"),
    "training.fp16": _switch("16-mixed"),
    "logging.swanlab": _logger_options,
    "logging.tensorboard": _logger_options,
    "swanlab": _logger_options,
}
"""Old key -> conversion of its value; a value that it does not know is left to the schema."""
CONVERSION_REASONS = {"model.max_seq_len": "no real adapter fits; auto is its length"}

SWANLAB = ("logging.swanlab", "swanlab")
FORMATS = (
    LegacyFormat(
        "traditional",
        "lora",
        ("training.per_device_train_batch_size", "training.stage1", "training.stage2"),
        LORA_RENAMED,
        LORA_REMOVED,
    ),
    LegacyFormat(
        "flat Lightning",
        "lora",
        (
            "training.stage1_steps",
            "training.stage2_steps",
            "training.learning_rate_stage1",
            "training.learning_rate_stage2",
        ),
        LORA_RENAMED,
        LORA_REMOVED,
    ),
    LegacyFormat(
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
        GENERATOR_RENAMED,
        GENERATOR_REMOVED,
    ),
    # A file with nothing but a section of SwanLab may belong to either command.
    LegacyFormat("flat Lightning", "lora", SWANLAB, LORA_RENAMED, LORA_REMOVED),
)
