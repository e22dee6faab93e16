"""PEFT adapters on disk: read, write and verify, without the base model.

Everywhere in loragen an adapter's tensors go by PEFT's file keys:
``base_model.model.<path of the module>.lora_A.weight``.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from loragen.core.adapter import CONFIG_FILE, WEIGHTS_FILE
from loragen.core.config.schema import LoraSection
from loragen.core.errors import DataError, LoragenError, UsageError, listing
from loragen.core.files import write_json, write_text, written_atomically


@dataclass
class Adapter:
    """A LoRA adapter: PEFT's configuration, plain data, and its tensors by PEFT's file keys."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def __repr__(self) -> str:
        """In a line: there are hundreds of tensors."""
        values = sum(tensor.numel() for tensor in self.tensors.values())
        base, rank = (self.config.get(key) for key in ("base_model_name_or_path", "r"))
        return f"<{type(self).__name__}: {values:,} values, rank {rank}, for {base}>"


def read_adapter(directory: Path) -> Adapter:
    """Raises UsageError where there is no adapter, DataError where its files are broken."""
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / name).is_file():
            raise UsageError(f"{directory}: not a PEFT adapter (it has no {name})")
    try:
        config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{directory / CONFIG_FILE}: not JSON: {error}") from None
    _check_is_lora(directory / CONFIG_FILE, config)
    return Adapter(config, read_safetensors(directory / WEIGHTS_FILE))


def _check_is_lora(file: Path, config: Any) -> None:
    if not isinstance(config, dict):
        raise DataError(f"{file}: expected a JSON object, found {type(config).__name__}")
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise DataError(f"{file}: peft_type is {kind}; only LoRA adapters are known here")
    for name in ("r", "lora_alpha"):
        if not isinstance(config.get(name), int | float):
            raise DataError(f"{file}: no LoRA adapter: {name} has to be a number")


def read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(file))
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file}: not a safetensors file: {error}") from None


def write_safetensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A file with the permissions of any other: safetensors makes it its owner's alone."""
    file.touch()
    usual = file.stat().st_mode
    save_file(tensors, file, metadata)  # twice as fast as writing the bytes of `save`
    file.chmod(usual)


def write_adapter(directory: Path, adapter: Adapter, card: str) -> None:
    """A directory that `peft.PeftModel.from_pretrained` loads; appears whole or not at all."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in adapter.tensors.items()}
    with written_atomically(directory) as temporary:
        temporary.mkdir()
        write_json(temporary / CONFIG_FILE, adapter.config)
        write_safetensors(temporary / WEIGHTS_FILE, tensors, {"format": "pt"})
        write_text(temporary / "README.md", card)


def peft_config(lora: LoraSection, base_model: str | None = None) -> Any:
    """PEFT's configuration of a causal language model's adapter."""
    from peft import LoraConfig, TaskType

    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT divides it, any number does
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base_model,
    )


def new_config(lora: LoraSection, base_model: str) -> dict[str, Any]:
    """The same as plain data."""
    return plain_config(peft_config(lora, base_model))


def plain_config(config: Any) -> dict[str, Any]:
    """PEFT's configuration as sorted plain data; sets become lists, so that two equal
    configurations are equal text (PEFT's own order depends on PYTHONHASHSEED)."""
    document = {**config.to_dict(), "inference_mode": True}
    plain = json.loads(json.dumps(document, default=_plain))
    if isinstance(plain.get("target_modules"), list):
        plain["target_modules"] = sorted(plain["target_modules"])
    return dict(sorted(plain.items()))


def module_scaling(config: Mapping[str, Any], module: str) -> float:
    """alpha / r, or alpha / √r (rsLoRA), with PEFT's exceptions for single modules."""
    alpha = _exception(config.get("alpha_pattern"), module, config["lora_alpha"])
    rank = _exception(config.get("rank_pattern"), module, config["r"])
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _exception(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    """As PEFT's `get_pattern_key`: the first pattern that the end of the path matches."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def file_keys(live: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Live or Lightning keys -> PEFT's file keys."""
    return {
        key.removeprefix("model.").replace(".default.", "."): tensor
        for key, tensor in live.items()
        if "lora_" in key
    }


def attach_adapter(base: Any, adapter: Adapter, origin: str) -> Any:
    """`base` with the adapter injected, as a `peft.PeftModel`.

    Raises LoragenError naming the first tensor that the base has no place for, or whose shape
    differs; PEFT itself would skip it or fail with a page of text. The base is then unchanged.
    """
    from peft import LoraConfig, get_peft_model

    try:
        model = get_peft_model(base, LoraConfig(**_known_fields(adapter.config)))
    except ValueError as error:
        raise LoragenError(f"{origin}: does not fit this base model: {error}") from None
    try:
        swap_adapter(model, adapter, origin)
    except LoragenError:
        model.unload()
        raise
    return model.eval()


def swap_adapter(model: Any, adapter: Adapter, origin: str) -> None:
    """Gives other weights to a model that `attach_adapter` made; quicker than attaching again.

    Raises LoragenError naming the first tensor that is missing, has no place or another shape.
    """
    from peft import set_peft_model_state_dict

    wanted = {key: value.shape for key, value in file_keys(model.state_dict()).items()}
    problem = shape_mismatch(wanted, {key: t.shape for key, t in adapter.tensors.items()})
    if problem:
        raise LoragenError(f"{origin}: does not fit this base model: {problem}")
    set_peft_model_state_dict(model, adapter.tensors)


def shape_mismatch(wanted: Mapping[str, torch.Size], given: Mapping[str, torch.Size]) -> str | None:
    """The first difference between two sets of named shapes, in words; None where equal."""
    missing, unknown = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    if missing:
        return f"{len(missing)} tensors are missing: {listing(missing, 2)}"
    if unknown:
        return f"{len(unknown)} tensors have no place: {listing(unknown, 2)}"
    for key, shape in wanted.items():
        if given[key] != shape:
            return f"{key} has shape {list(given[key])}, expected {list(shape)}"
    return None


def _known_fields(config: dict[str, Any]) -> dict[str, Any]:
    """An adapter written by a newer PEFT may carry fields that this one does not know.

    The base's name is left out: PEFT would warn where the weights come from elsewhere.
    """
    from dataclasses import fields

    from peft import LoraConfig

    known = {field.name for field in fields(LoraConfig) if field.init}
    known -= {"base_model_name_or_path", "runtime_config"}
    kept = {key: value for key, value in config.items() if key in known}
    return {**kept, "inference_mode": True}


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)
