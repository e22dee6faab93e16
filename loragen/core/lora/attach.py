"""A LoRA with its first weights on a base model, and what it will weigh, before there is one."""

from typing import Any

import torch

from loragen.core.adapters import peft_config
from loragen.core.base_models import BaseModel, empty_base
from loragen.core.config import LoraTrainConfig
from loragen.core.errors import UsageError, listing


def new_adapter(base: BaseModel, config: LoraTrainConfig) -> Any:
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
