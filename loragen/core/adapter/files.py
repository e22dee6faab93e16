"""PEFT adapters: read and write their directories, attach them to a base model.

Everywhere in loragen the keys of an adapter's tensors are those of PEFT's files:
``base_model.model.<path of the module>.lora_A.weight``.
"""

import hashlib
import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from loragen.core.adapter import CARD, CONFIG_FILE, KEY_PREFIX, WEIGHTS_FILE, adapter_record
from loragen.core.adapter.checks import (
    check_config,
    check_factors,
    check_finite,
    file_keys,
    warn_of_config,
)
from loragen.core.config.schema import LoraSection
from loragen.core.contents import read_json, safetensors_fault
from loragen.core.errors import DataError, LoragenError, UsageError, first_line, listing
from loragen.core.files import write_json, write_text
from loragen.core.outputs import with_record, written_directory

log = logging.getLogger(__name__)

TEMPLATE_KWARGS = "chat_template_kwargs"
"""The key, in the metadata of a safetensors file, of what the chat template is given, as JSON."""
CHECKSUM = "loragen_crc32"
"""The key of the checksum in the metadata of a safetensors file that loragen has written."""

LINEAGE = "lineage"
"""The key of `Adapter.lineage` there, as JSON."""

PEFT_ERRORS = (
    AttributeError,
    ImportError,
    IndexError,
    KeyError,
    NotImplementedError,  # of PEFT, for methods and layers that it does not support
    RuntimeError,
    TypeError,
    ValueError,
    re.error,
)
"""What PEFT raises for a configuration that it cannot attach."""


@dataclass
class Adapter:
    """A LoRA adapter: PEFT's configuration as plain data, and its tensors by PEFT's file keys."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    directory: Path | None = field(default=None, kw_only=True)
    """The PEFT directory that it was read from, where a tokenizer may lie beside it."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict, kw_only=True)
    """What the chat template was given in training, and has to be given in use."""
    lineage: dict[str, Any] = field(default_factory=dict, kw_only=True)
    """What made it: the `command`, and plain data that depend on that; empty if not known. It stays
    with the adapter in the metadata of its file."""

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of a safetensors file of it, which are texts."""
        names = {"base_model": "base_model_name_or_path", "rank": "r", "lora_alpha": "lora_alpha"}
        known = {key: self.config.get(name) for key, name in names.items()}
        found = {key: str(value) for key, value in known.items() if value is not None}
        if self.chat_template_kwargs:
            found[TEMPLATE_KWARGS] = json.dumps(self.chat_template_kwargs, default=str)
        if self.lineage:
            found[LINEAGE] = json.dumps(self.lineage, ensure_ascii=False)
        return {"format": "pt", **found}

    def __repr__(self) -> str:
        """Returns one line, since an adapter has hundreds of tensors."""
        values = sum(tensor.numel() for tensor in self.tensors.values())
        base, rank = (self.config.get(key) for key in ("base_model_name_or_path", "r"))
        return f"<{type(self).__name__}: {values:,} values, rank {rank}, for {base}>"


# ---------------------------------------------------------------------------- files


def read_adapter(directory: Path) -> Adapter:
    """Reads a PEFT adapter directory; the base model is not needed.

    Raises UsageError if there is no adapter, DataError if its files are broken, no LoRA, or
    contradict each other (see `checks`).
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / name).is_file():
            raise UsageError(f"{directory}: not a PEFT adapter (it has no {name})")
    config = read_config(directory)
    file = directory / WEIGHTS_FILE
    tensors, metadata = read_safetensors(file)
    return checked(config, tensors, file, metadata)


def read_config(directory: Path) -> dict[str, Any]:
    """Returns the configuration of a PEFT adapter directory. Raises DataError if it is broken."""
    file = directory / CONFIG_FILE
    config: dict[str, Any] = read_json(file)
    check_config(config, file)
    return config


def checked(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    file: Path,
    metadata: Mapping[str, str] | None = None,
) -> Adapter:
    """Returns the adapter of a file, with PEFT's file keys. Raises DataError as `checks` does; an
    empty `config` is not known. The `metadata` of a safetensors file may be a stranger's."""
    if not tensors:
        raise DataError(f"{file}: no LoRA tensors in it (no key has 'lora_')")
    found = file_keys(tensors, file)
    check_factors(config or None, found, file)

    def in_metadata(key: str) -> dict[str, Any]:
        with suppress(ValueError):
            value = json.loads((metadata or {}).get(key, "{}"))
            return value if isinstance(value, dict) else {}
        return {}

    generated = in_metadata("generated")  # of a file of `gen infer`
    return Adapter(
        dict(config),
        found,
        directory=file.parent if (file.parent / CONFIG_FILE).is_file() else None,
        chat_template_kwargs=in_metadata(TEMPLATE_KWARGS),
        lineage=in_metadata(LINEAGE) or (generated and {"command": "gen infer", **generated}),
    )


def write_adapter(
    directory: Path, adapter: Adapter, card: str, tokenizer: Any | None = None
) -> None:
    """Writes a directory that `peft.PeftModel.from_pretrained` loads, in place of an earlier one;
    files of others stay. The card records the other files. Raises DataError for NaN or infinity."""
    check_finite(adapter.tensors, directory)
    tensors = {key: value.detach().cpu().contiguous() for key, value in adapter.tensors.items()}
    with written_directory(directory, adapter_record) as temporary:
        write_json(temporary / CONFIG_FILE, adapter.config)
        write_safetensors(temporary / WEIGHTS_FILE, tensors, adapter.metadata)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        write_text(temporary / CARD, with_record(card, temporary))


def read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns tensors and metadata. Raises DataError if `file` is not a safetensors file, or is one
    of loragen that is not as it was written."""
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = dict(opened.metadata() or {})
        tensors = dict(load_file(file))
    except (SafetensorError, OSError) as error:
        fault = safetensors_fault(file)
        truncated = fault and fault.startswith("truncated")
        reason = fault if truncated else f"not a safetensors file: {fault or error}"
        raise DataError(f"{file}: {reason}") from None
    if metadata.get(CHECKSUM, checksum := _checksum(tensors)) != checksum:
        raise DataError(
            f"{file}: damaged: its tensors are not those that were written ({CHECKSUM} in its "
            "metadata); restore it, or make it again"
        )
    return tensors, metadata


def write_safetensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a file with the usual permissions; safetensors would let only its owner read it. Its
    metadata also have a checksum of the tensors. Equal tensors and metadata make equal bytes."""
    file.touch()
    usual = file.stat().st_mode
    described = metadata | {CHECKSUM: _checksum(tensors)}
    save_file(tensors, file, described)  # twice as fast as writing the bytes that `save` returns
    with file.open("r+b") as opened:  # safetensors writes several metadata in a random order
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(ordered) <= length:  # padded with spaces, as the format wants it
            opened.seek(8)
            opened.write(ordered.ljust(length))
    file.chmod(usual)


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    found = 0
    for part in _bytes_of(tensors):
        found = crc32(part, found)
    return f"{found:08x}"


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """Returns the hash of the tensors, whatever the format of their file."""
    found = hashlib.sha256()
    for part in _bytes_of(tensors):
        found.update(part)
    return found.hexdigest()


def _bytes_of(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yields names, dtypes, shapes and values."""
    for key in sorted(tensors):
        tensor = tensors[key].contiguous()
        yield f"{key} {tensor.dtype} {list(tensor.shape)}".encode()
        yield tensor.reshape(-1).view(torch.uint8).numpy().data


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


# ---------------------------------------------------------------------------- live models


def adapter_state(model: Any) -> dict[str, Tensor]:
    """Returns the adapter's tensors of a live `PeftModel`, by PEFT's file keys."""
    from peft import get_peft_model_state_dict

    # Not "auto": that would look up the base model on the hub, and may add its embeddings.
    return dict(get_peft_model_state_dict(model, save_embedding_layers=False))


def attach_adapter(base: Any, adapter: Adapter, origin: str) -> Any:
    """Injects an adapter into `base` and returns the `PeftModel`, in eval mode. Any kind of LoRA
    that PEFT knows is attached, and the `OTHER_METHODS` of `checks`.

    Some kinds change the base itself: new tokens resize its vocabulary, biases and modules_to_save
    replace its weights. Of s · B A, the base is unchanged once the model is unloaded, and after an
    error. Raises LoragenError if the adapter does not fit, naming the first tensor that the base
    lacks or that has another shape; PEFT itself would skip it or fail with a page of text.
    """
    from peft import get_peft_model

    warn_of_config(adapter.config, origin)
    method, config = _known_fields(adapter.config)
    _resize_vocabulary(base, adapter, origin)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = get_peft_model(base, method(**{**config, "inference_mode": True}))
        except PEFT_ERRORS as error:
            raise LoragenError(
                f"{origin}: does not fit this base model: {first_line(error)}"
            ) from None
        replicated = config.get("layer_replication")
        types = getattr(base.config, "layer_types", None)
        if replicated and types:  # PEFT forgets them
            base.config.layer_types = [types[i] for layers in replicated for i in range(*layers)]
        try:
            swap_adapter(model, adapter, origin)
        except LoragenError:
            model.unload()
            raise
    return model.eval()


def swap_adapter(model: Any, adapter: Adapter, origin: str) -> None:
    """Loads other weights into a model of `attach_adapter`, which is faster than attaching again.

    Raises LoragenError naming the first tensor that is missing, unexpected or of another shape, and
    DataError for NaN or infinity.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    check_finite(adapter.tensors, origin)
    found = {key: tensor.shape for key, tensor in adapter.tensors.items()}
    expected = {key: value.shape for key, value in adapter_state(model).items()}
    if found.keys() > expected.keys():  # PEFT may have saved the base's embeddings, too
        with_embeddings = get_peft_model_state_dict(model, save_embedding_layers=True)
        expected |= {k: v.shape for k, v in with_embeddings.items() if k in found}
    if problem := shape_mismatch(expected, found):
        raise LoragenError(f"{origin}: does not fit this base model: {problem}")
    set_peft_model_state_dict(model, adapter.tensors)


def _resize_vocabulary(base: Any, adapter: Adapter, origin: str) -> None:
    """Gives the base as many tokens as the embeddings have that the adapter brings along."""
    both = (base.get_input_embeddings(), base.get_output_embeddings())
    names = tuple(f"{KEY_PREFIX}{n}." for n, one in base.named_modules() if n and one in both)
    rows = {
        tensor.shape[0]
        for key, tensor in adapter.tensors.items()
        if key.startswith(names) and "lora_" not in key and key.endswith(".weight")
    }
    if len(rows) == 1 and rows != {len(both[0].weight)}:
        log.info(
            "%s: its vocabulary has %d tokens, the base %d", origin, *rows, len(both[0].weight)
        )
        base.resize_token_embeddings(*rows, mean_resizing=False)


def fitting_shapes(base: Any, config: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Returns the shapes of the tensors of an adapter with this configuration for `base`, which
    needs no weights and is changed. Raises LoragenError if PEFT cannot attach it."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            lora = LoraConfig(**{**_known_fields(config)[1], "init_lora_weights": True})
            model = get_peft_model(base, lora)
        except PEFT_ERRORS as error:
            raise LoragenError(first_line(error)) from None
        return {key: value.shape for key, value in adapter_state(model).items()}


def _known_fields(config: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Returns PEFT's class of a configuration, and the fields of it that the installed PEFT knows.
    The base's name is left out, because PEFT would warn if the weights come from elsewhere."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType

    method = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(config.get("peft_type", "LORA"))]
    known = {one.name for one in fields(method) if one.init}
    known -= {"base_model_name_or_path", "runtime_config"}
    return method, {key: value for key, value in config.items() if key in known}


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
