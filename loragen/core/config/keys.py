"""The keys of a configuration: which there are, and which one was meant.

Users bring the names of PEFT, transformers, TRL and the tools around them. An unknown key is looked
for by its name and by its names there, below every section, and then by similarity.
"""

from collections.abc import Iterator
from contextlib import suppress
from difflib import get_close_matches
from typing import Any, get_origin

from pydantic import BaseModel

from loragen.core.config.schema import PluginSection
from loragen.core.config.yaml_file import Loc, dotted
from loragen.core.errors import PluginError
from loragen.core.plugins import find

_SAME = {
    "accumulate_grad_batches": "gradient_accumulation_steps grad_accum grad_accumulation_steps",
    "alpha": "lora_alpha",
    "base_dtype": "torch_dtype dtype model_dtype",
    "base_model": "model model_name model_name_or_path base_model_name_or_path "
    "pretrained_model_name_or_path model_id model_id_or_path",
    "base_quantization": "quantization quantization_bit quantize",
    "base_quantization: 4bit": "load_in_4bit",
    "base_quantization: 8bit": "load_in_8bit",
    "batch_size": "per_device_train_batch_size per_device_batch_size per_gpu_train_batch_size "
    "train_batch_size micro_batch_size global_batch_size bs",
    "checkpoints.every": "save_steps checkpoint_every checkpointing_steps",
    "data.dataset": "dataset_name dataset_path data_path train_file train_data train_dataset "
    "datasets",
    "devices": "num_processes num_gpus n_gpu gpus nproc_per_node",
    "dropout": "lora_dropout",
    "experiments_dir": "output_dir output save_dir",
    "gradient_clip_val": "max_grad_norm gradient_clipping clip_grad_norm grad_clip",
    "learning_rate": "lr peak_lr",
    "learning_rate_stage1": "learning_rate lr peak_lr",
    "loggers": "report_to logger tracker",
    "lora": "lora_config peft_config peft adapter",
    "max_epochs": "num_train_epochs num_epochs epochs n_epochs",
    "max_length": "max_seq_length max_seq_len cutoff_len sequence_len sequence_length "
    "model_max_length block_size",
    "max_steps": "steps num_steps train_steps max_train_steps num_training_steps total_steps "
    "num_train_epochs num_epochs epochs n_epochs",
    "num_nodes": "num_machines nnodes nodes",
    "patience": "early_stopping_patience",
    "rank": "r lora_r lora_rank",
    "runs_dir": "output_dir output save_dir",
    "schedule.name": "lr_scheduler_type lr_scheduler scheduler lr_schedule",
    "seed": "random_seed data_seed manual_seed",
    "strategy": "deepspeed fsdp distributed_strategy",
    "target_modules": "lora_target_modules lora_target lora_targets",
    "target_modules: all-linear": "lora_target_linear",
    "trainer.precision: 16-mixed": "fp16",
    "trainer.precision: bf16-mixed": "bf16",
    "trainer.precision": "mixed_precision amp",
    "training": "training_args training_arguments train trainer_args",
    "training.optimizer": "optim optimizer_name",
    "val_every": "eval_steps evaluation_steps eval_every validation_steps",
    "val_every_epochs": "eval_steps evaluation_steps eval_every validation_steps",
    "val_ratio": "val_set_size val_size test_size eval_split validation_split "
    "validation_split_percentage",
    "validation": "validation_file eval_dataset eval_file validation_data",
    "warmup_ratio": "warmup_steps num_warmup_steps warmup warmup_fraction",
    "workers": "dataloader_num_workers num_workers",
}
"""{a key here, with its section where the name alone is not enough, and perhaps a value: its names
elsewhere}"""
COMMON_NAMES: dict[str, list[str]] = {}
"""{a name elsewhere: keys here; a configuration has the first one or another}"""
for _key, _names in _SAME.items():
    for _name in _names.split():
        COMMON_NAMES.setdefault(_name, []).append(_key)


def has_key(model: type[BaseModel], keys: Loc) -> bool:
    """Returns whether the schema has this key; it does not have the options of plugins."""
    for part in keys[:-1]:
        section = section_of(model, part)
        if section is None:
            return False
        model = section
    return keys[-1] in model.model_fields


def known_keys(model: type[BaseModel], loc: Loc) -> list[str]:
    """Returns the keys of the section at `loc`, which may lead through lists and unions."""
    for part in loc:
        model = section_of(model, part) or model
    return list(model.model_fields)


def section_of(model: type[BaseModel], key: Any) -> type[BaseModel] | None:
    """Returns the model of a field, or of its items; None if the field is a plain value."""
    if not isinstance(key, str) or key not in model.model_fields:
        return None
    annotation = model.model_fields[key].annotation
    nested = [annotation, *getattr(annotation, "__args__", ())]
    return next((t for t in nested if isinstance(t, type) and issubclass(t, BaseModel)), None)


def all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every key with dots and its pydantic field, a section before its keys.

    Of plugins there are the names, and the options of the default schedule: other plugins import
    torch. Items of lists have no keys here.
    """
    for name, info in model.model_fields.items():
        yield prefix + name, info
        section = section_of(model, name)
        if section is PluginSection:
            yield f"{prefix}{name}.name", section.model_fields["name"]
            section = None
            if name == "schedule" and isinstance(info.default, PluginSection):
                with suppress(PluginError):
                    section = find(name, info.default.name).Config
        if section is not None and get_origin(info.annotation) is not list:
            yield from all_keys(section, f"{prefix}{name}.")


def meant(model: type[BaseModel], loc: Loc) -> str | None:
    """Returns the key that was meant by an unknown one: with dots, by its name alone if it is in
    the same section, or as `key: value`. None if nothing is like it."""
    key = str(loc[-1])
    everywhere = [at for at, _ in all_keys(model)]
    beside = known_keys(model, loc[:-1])
    foreign = key.lower().replace("-", "_")
    near = get_close_matches(foreign, COMMON_NAMES, n=1, cutoff=0.9)
    for name in (key, *COMMON_NAMES.get(foreign, ()), *(COMMON_NAMES[near[0]] if near else ())):
        wanted, _, value = name.partition(": ")
        same = [at for at in everywhere if at == wanted or at.endswith(f".{wanted}")]
        own = [at for at in same if at in {dotted((*loc[:-1], one)) for one in beside}]
        if same:
            return (own or same)[0] + (f": {value}" if value else "")
    if similar := get_close_matches(key, beside, n=1, cutoff=0.6):
        return similar[0]
    last = {at.rpartition(".")[2]: at for at in reversed(everywhere)}
    elsewhere = get_close_matches(key, last, n=1, cutoff=0.75)
    return last[elsewhere[0]] if elsewhere else None
