"""An adapter merged into its base: an ordinary Hugging Face model.

A checkpoint -> what other tools load: a PEFT directory, or a merged Hugging Face model.
"""

from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from loragen.core.adapter import MERGED_MARKER
from loragen.core.adapter.files import Adapter, attach_adapter, write_adapter
from loragen.core.base.load import LanguageModel, load_base
from loragen.core.base.names import resolve_base
from loragen.core.config import DEMO
from loragen.core.errors import UsageError
from loragen.core.files import write_json, write_text, written_atomically


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


def save_merged(model: Any, base: LanguageModel, directory: Path) -> None:
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


def prepare_export(
    adapter: Adapter, origin: Path, base_model: str | None, alpha: float | None
) -> Adapter:
    """The adapter with the base model and the alpha that were given instead of those recorded, and
    with a base model's name that transformers can resolve here.

    Raises UsageError where the base is neither recorded nor given.
    """
    config = dict(adapter.config)
    if alpha is not None:
        config["lora_alpha"] = alpha
    name = base_model or config.get("base_model_name_or_path")
    if not name:
        raise UsageError(f"{origin}: its base model is not recorded; give --base-model")
    config["base_model_name_or_path"] = resolvable(name)
    return Adapter(config, adapter.tensors)


def export_adapter(adapter: Adapter, source: Path, output: Path) -> None:
    """A PEFT directory; appears whole or not at all."""
    write_adapter(output, adapter, _card(adapter, source, merged=False))


def export_merged(adapter: Adapter, source: Path, output: Path) -> None:
    """The base with the adapter in its weights, in the base's stored dtype, with its tokenizer.

    Computed in float32. Raises LoragenError where the adapter does not fit the base.
    """
    name = adapter.config["base_model_name_or_path"]
    base = load_base(name, torch.float32)
    model = attach_adapter(base.model, adapter, str(source))
    with written_atomically(output) as temporary:
        save_merged(model, base, temporary)
        write_text(temporary / "README.md", _card(adapter, source, merged=True))
        document = {"adapter": str(source), "base_model": name, "loragen": version("loragen")}
        write_json(temporary / MERGED_MARKER, document)


def resolvable(name: str) -> str:
    """What plain transformers and peft find from any directory of this machine."""
    with suppress(UsageError):  # recorded on another machine; the adapter is good all the same
        source = resolve_base(name)
        return str(Path(source).absolute()) if Path(source).is_dir() else source
    return name


def _card(adapter: Adapter, source: Path, merged: bool) -> str:
    config, base = adapter.config, adapter.config["base_model_name_or_path"]
    library, what = ("transformers", "merged into") if merged else ("peft", "for")
    origin = "" if Path(base).is_dir() else f"base_model: {base}\n"  # a hub id, or nothing there
    card = (
        f"---\n{origin}library_name: {library}\ntags: [lora, loragen]\n---\n\n"
        f"# {source.absolute().name}\n\n"
        f"A LoRA adapter (rank {config['r']}, alpha {config['lora_alpha']:g}) {what} {base}, "
        f"written by `loragen lora export`.\n"
    )
    if base == resolvable(DEMO) and not merged:
        card += (
            "\nThat base is the tiny one that ships with loragen, in `loragen/demo/base` of the "
            "installed package. On another machine, put its path there into adapter_config.json.\n"
        )
    return card
