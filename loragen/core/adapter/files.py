"""PEFT adapters: read and write their directories, attach them to a base model.

Everywhere in loragen the keys of an adapter's tensors are those of PEFT's files:
``base_model.model.<path of the module>.lora_A.weight``.
"""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from loragen.core.adapter import CONFIG_FILE, WEIGHTS_FILE
from loragen.core.config.schema import LoraSection
from loragen.core.errors import DataError, LoragenError, UsageError, listing
from loragen.core.files import read_json, write_json, write_text, written_atomically

log = logging.getLogger(__name__)


@dataclass
class Adapter:
    """A LoRA adapter: PEFT's configuration as plain data, and its tensors by PEFT's file keys."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def __repr__(self) -> str:
        """Returns one line, since an adapter has hundreds of tensors."""
        values = sum(tensor.numel() for tensor in self.tensors.values())
        base, rank = (self.config.get(key) for key in ("base_model_name_or_path", "r"))
        return f"<{type(self).__name__}: {values:,} values, rank {rank}, for {base}>"


# ---------------------------------------------------------------------------- files


def read_adapter(directory: Path) -> Adapter:
    """Reads a PEFT adapter directory; the base model is not needed.

    Raises UsageError if there is no adapter, DataError if its files are broken.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / name).is_file():
            raise UsageError(f"{directory}: not a PEFT adapter (it has no {name})")
    file = directory / CONFIG_FILE
    config = read_json(file)
    if not isinstance(config, dict):
        raise DataError(f"{file}: expected a JSON object, found {type(config).__name__}")
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise DataError(f"{file}: peft_type is {kind}; only LORA is supported")
    for name in ("r", "lora_alpha"):
        if not isinstance(config.get(name), int | float):
            raise DataError(f"{file}: not a LoRA adapter; {name} must be a number")
    return Adapter(config, read_safetensors(directory / WEIGHTS_FILE))


def write_adapter(directory: Path, adapter: Adapter, card: str) -> None:
    """Writes a directory that `peft.PeftModel.from_pretrained` loads, atomically."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in adapter.tensors.items()}
    with written_atomically(directory) as temporary:
        temporary.mkdir()
        write_json(temporary / CONFIG_FILE, adapter.config)
        write_safetensors(temporary / WEIGHTS_FILE, tensors, {"format": "pt"})
        write_text(temporary / "README.md", card)


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """Raises DataError if `file` is not a safetensors file."""
    try:
        return dict(load_file(file))
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file}: not a safetensors file: {error}") from None


def write_safetensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a file with the usual permissions; safetensors would let only its owner read it."""
    file.touch()
    usual = file.stat().st_mode
    save_file(tensors, file, metadata)  # twice as fast as writing the bytes that `save` returns
    file.chmod(usual)


# ---------------------------------------------------------------------------- configuration


def peft_config(lora: LoraSection, base_model: str | None = None) -> Any:
    """Returns PEFT's `LoraConfig` for a causal language model."""
    from peft import LoraConfig, TaskType

    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT also accepts a float
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base_model,
    )


def plain_config(config: Any) -> dict[str, Any]:
    """Returns a `LoraConfig` as sorted plain data.

    Sets become sorted lists: PEFT's own order depends on PYTHONHASHSEED, and two equal
    configurations have to be equal text.
    """
    document = {**config.to_dict(), "inference_mode": True}
    text = json.dumps(document, default=lambda v: sorted(v) if isinstance(v, set) else str(v))
    plain = json.loads(text)
    if isinstance(plain.get("target_modules"), list):
        plain["target_modules"] = sorted(plain["target_modules"])
    return dict(sorted(plain.items()))


def module_scaling(config: Mapping[str, Any], module: str) -> float:
    """Returns the factor of B A: alpha / r, or alpha / √r with rsLoRA.

    As in PEFT (`get_pattern_key`), the first pattern of `alpha_pattern` and of `rank_pattern` that
    matches the end of the module's path replaces the adapter's value. PEFT itself computes the
    factor only when the adapter is attached to a base model.
    """

    def value(patterns: Mapping[str, float] | None, default: float) -> float:
        matching = (v for p, v in (patterns or {}).items() if re.match(rf"(.*\.)?({p})$", module))
        return next(matching, default)

    alpha = value(config.get("alpha_pattern"), config["lora_alpha"])
    rank = value(config.get("rank_pattern"), config["r"])
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))


# ---------------------------------------------------------------------------- live models


def adapter_state(model: Any) -> dict[str, Tensor]:
    """Returns the adapter's tensors of a live `PeftModel`, by PEFT's file keys."""
    from peft import get_peft_model_state_dict

    # Not "auto": that would look up the base model on the hub, and may add its embeddings.
    return dict(get_peft_model_state_dict(model, save_embedding_layers=False))


def file_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts the keys of a checkpoint to PEFT's file keys, without a live model.

    A Lightning checkpoint adds the prefix ``model.``, and a live model has the adapter's name,
    ``default``, in its keys, and ``.weight`` after a DoRA vector; a file has none of these. Tensors
    that are not LoRA's are left out. File keys stay as they are.
    """
    tensors = {}
    for key, tensor in state.items():
        if "lora_" in key:
            name = re.sub(r"\.default(?=\.|$)", "", key.removeprefix("model."))
            tensors[re.sub(r"(lora_magnitude_vector)\.weight$", r"\1", name)] = tensor
    return tensors


def attach_adapter(base: Any, adapter: Adapter, origin: str) -> Any:
    """Injects an adapter into `base` and returns the `PeftModel`, in eval mode.

    Raises LoragenError if the adapter does not fit, naming the first tensor that the base lacks
    or that has another shape; PEFT itself would skip it or fail with a page of text. The base is
    then unchanged.
    """
    from peft import LoraConfig, get_peft_model

    # An adapter of a newer PEFT may have fields that this one lacks; an empty one changes nothing.
    known = {field.name for field in fields(LoraConfig) if field.init}
    unknown = [key for key, value in adapter.config.items() if value and key not in known]
    if unknown:
        log.warning(
            "%s: the installed PEFT has no field %s and ignores it: the adapter may be of a newer "
            "PEFT, and compute something else there (pip install --upgrade peft)",
            origin,
            listing(sorted(unknown)),
        )
    # The base's name is left out, because PEFT would warn if the weights come from elsewhere.
    known -= {"base_model_name_or_path", "runtime_config"}
    config = {key: value for key, value in adapter.config.items() if key in known}
    try:
        model = get_peft_model(base, LoraConfig(**{**config, "inference_mode": True}))
    except ValueError as error:
        raise LoragenError(f"{origin}: does not fit this base model: {error}") from None
    try:
        swap_adapter(model, adapter, origin)
    except LoragenError:
        model.unload()
        raise
    return model.eval()


def swap_adapter(model: Any, adapter: Adapter, origin: str) -> None:
    """Loads other weights into a model of `attach_adapter`, which is faster than attaching again.

    Raises LoragenError naming the first tensor that is missing, unexpected or of another shape, and
    if the adapter also has weights of the base.
    """
    from peft import set_peft_model_state_dict

    expected = {key: value.shape for key, value in adapter_state(model).items()}
    of_base = [key for key in {**expected, **adapter.tensors} if "lora_" not in key]
    if of_base:
        raise LoragenError(
            f"{origin}: has weights of the base itself ({listing(of_base, 2)}), from bias, "
            "modules_to_save or save_embedding_layers; only LoRA matrices are supported"
        )
    problem = shape_mismatch(expected, {key: t.shape for key, t in adapter.tensors.items()})
    if problem:
        raise LoragenError(f"{origin}: does not fit this base model: {problem}")
    set_peft_model_state_dict(model, adapter.tensors)


def shape_mismatch(
    expected: Mapping[str, torch.Size], found: Mapping[str, torch.Size]
) -> str | None:
    """Describes the first difference between two sets of named shapes; None for equal ones."""
    if missing := sorted(expected.keys() - found.keys()):
        return f"{len(missing)} tensors are missing: {listing(missing, 2)}"
    if unexpected := sorted(found.keys() - expected.keys()):
        return f"{len(unexpected)} tensors are unexpected: {listing(unexpected, 2)}"
    for key, shape in expected.items():
        if found[key] != shape:
            return f"{key} has shape {list(found[key])}, expected {list(shape)}"
    return None
