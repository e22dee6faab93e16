"""An adapter merged into its base: an ordinary Hugging Face model."""

from pathlib import Path
from typing import Any

import torch

from loragen.core.base_models import BaseModel


def merged_state(model: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The base's state dict with ΔW = alpha / rank · B A added, in `dtype`; `model` is unchanged.

    (peft's merge changes the base in place, and unmerging does not give it back exactly.)
    """
    layers = {
        f"{name}.base_layer.weight": layer
        for name, layer in model.get_base_model().named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    state = {}
    for key, value in model.get_base_model().state_dict().items():
        if "lora_" not in key:
            merged = value
            if key in layers:  # one ΔW at a time: all of them together are a second model
                merged = value + layers[key].get_delta_weight("default").to(value)
            state[key.replace(".base_layer.", ".")] = merged.to(dtype).cpu()
    return state


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
    usual = (directory / "config.json").stat().st_mode
    for weights in directory.glob("*.safetensors"):
        weights.chmod(usual)  # safetensors makes them readable for their owner alone
