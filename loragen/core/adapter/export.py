"""Exports adapters for use without loragen: as a PEFT directory, or merged into the base model."""

from contextlib import suppress
from copy import deepcopy
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


def prepare_export(
    adapter: Adapter, origin: Path, base_model: str | None, alpha: float | None
) -> Adapter:
    """Returns the adapter with `base_model` and `alpha`, if given, instead of its own, and with a
    name of the base that transformers resolves from any directory of this machine.

    Raises UsageError if the base is neither recorded nor given.
    """
    config = dict(adapter.config)
    if alpha is not None:
        config["lora_alpha"] = alpha
    name = base_model or config.get("base_model_name_or_path")
    if not name:
        raise UsageError(f"{origin}: its base model is not recorded; give --base-model")
    config["base_model_name_or_path"] = _resolvable(name)
    return Adapter(config, adapter.tensors)


def export_adapter(adapter: Adapter, source: Path, output: Path) -> None:
    """Writes a PEFT directory, atomically."""
    write_adapter(output, adapter, _card(adapter, source, merged=False))


def export_merged(adapter: Adapter, source: Path, output: Path) -> None:
    """Writes the base model with the adapter merged in, in the base's stored dtype, and its
    tokenizer. The merge is computed in float32.

    Raises LoragenError if the adapter does not fit the base.
    """
    name = adapter.config["base_model_name_or_path"]
    base = load_base(name, torch.float32)
    model = attach_adapter(base.model, adapter, str(source))
    with written_atomically(output) as temporary:
        save_merged(model, base, temporary)
        write_text(temporary / "README.md", _card(adapter, source, merged=True))
        document = {"adapter": str(source), "base_model": name, "loragen": version("loragen")}
        write_json(temporary / MERGED_MARKER, document)


def save_merged(model: Any, base: LanguageModel, directory: Path) -> None:
    """Saves a `PeftModel` as a Hugging Face model directory: the adapter merged into the base, in
    the base's stored dtype, and the tokenizer. `model` is unchanged."""
    plain = model.get_base_model()
    kept = plain.config.dtype
    plain.save_pretrained(directory, state_dict=merged_state(model, base.dtype))
    plain.config.dtype = base.dtype  # save_pretrained writes the dtype of the model in memory
    try:
        plain.config.save_pretrained(directory)
    finally:
        plain.config.dtype = kept
    base.tokenizer.save_pretrained(directory)
    usual = (directory / "config.json").stat().st_mode
    for weights in directory.glob("*.safetensors"):
        weights.chmod(usual)  # safetensors lets only the owner read them


def merged_state(model: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Returns the base's state dict with ΔW = alpha / r · B A added, in `dtype`.

    `model` is unchanged. PEFT's own merge would change the base in place, and unmerging does not
    restore it exactly. One layer is merged at a time, since all ΔW are as large as the model.
    """
    layers = {
        f"{name}.base_layer.weight": layer
        for name, layer in model.get_base_model().named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    state: dict[str, torch.Tensor] = {}
    unchanged: dict[Any, torch.Tensor] = {}  # tied weights stay one tensor, which is saved once
    for key, value in model.get_base_model().state_dict().items():
        if "lora_" in key:
            continue
        layer = layers.get(key)
        if layer is None:
            own = value.data_ptr(), value.shape, value.stride()
            if own not in unchanged:
                unchanged[own] = value.to(dtype).cpu()
            converted = unchanged[own]
        elif getattr(layer, "lora_variant", None):  # DoRA also rescales W
            copy = deepcopy(layer)
            copy.merge()
            converted = copy.get_base_layer().weight.detach().to(dtype).cpu()
        else:
            converted = (value + layer.get_delta_weight("default").to(value)).to(dtype).cpu()
        state[key.replace(".base_layer.", ".")] = converted
    return state


def _resolvable(name: str) -> str:
    """Returns the path or hub id by which plain transformers and PEFT find a base model."""
    with suppress(UsageError):  # a path of another machine; the adapter can be written
        source = resolve_base(name)
        return str(Path(source).absolute()) if Path(source).is_dir() else source
    return name


def _card(adapter: Adapter, source: Path, merged: bool) -> str:
    """Returns the README.md of an export."""
    config, base = adapter.config, adapter.config["base_model_name_or_path"]
    library, what = ("transformers", "merged into") if merged else ("peft", "for")
    origin = "" if Path(base).is_dir() else f"base_model: {base}\n"  # only a hub id is valid there
    card = (
        f"---\n{origin}library_name: {library}\ntags: [lora, loragen]\n---\n\n"
        f"# {source.absolute().name}\n\n"
        f"A LoRA adapter (rank {config['r']}, alpha {config['lora_alpha']:g}) {what} {base}, "
        f"written by `loragen lora export`.\n"
    )
    if base == _resolvable(DEMO) and not merged:
        card += (
            "\nThat base is the tiny one that ships with loragen, in `loragen/demo/base` of the "
            "installed package. On another machine, put its path there into adapter_config.json.\n"
        )
    return card
