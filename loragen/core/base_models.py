"""Base models: from a name to the model, its tokenizer, and nothing more than is needed."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from loragen.core.base_names import resolve_base
from loragen.core.config import DEMO
from loragen.core.errors import LoragenError, UsageError, did_you_mean
from loragen.core.hub import silence
from loragen.core.quiet import quiet_libraries

WEIGHTS = tuple(
    f"{stem}{index}"
    for stem in ("model.safetensors", "pytorch_model.bin")
    for index in ("", ".index.json")
)
"""The files of which a base on the hub has one."""


@dataclass
class BaseModel:
    """A causal language model as loaded, frozen, and its tokenizer."""

    name: str
    model: Any
    tokenizer: Any
    dtype: torch.dtype
    """What the weights are stored in; a merged model is saved in it."""
    fingerprint: str
    """A hash of the weights as stored: two bases of one fingerprint train alike."""


def is_local(name: str) -> bool:
    """Whether a base is on this machine, as a directory or downloaded before: with its weights, a
    configuration alone may be here since a dry run."""
    from huggingface_hub import try_to_load_from_cache

    try:
        source = resolve_base(name)
    except UsageError:  # a directory that is gone
        return False
    cached = (try_to_load_from_cache(source, file) for file in WEIGHTS)
    return Path(source).is_dir() or any(isinstance(file, str) for file in cached)


def load_base(
    name: str, dtype: torch.dtype | None = None, quantization: Any | None = None
) -> BaseModel:
    """The model in `dtype` (default: as stored), on the CPU, in eval mode, all frozen.

    With a `quantization` of transformers it is on the GPU instead.

    Raises UsageError where it cannot be found, LoragenError where it does not load.
    """
    quiet_libraries()
    from transformers import AutoConfig, AutoModelForCausalLM

    source, where = resolve_base(name), _where(name)
    try:
        known = AutoConfig.from_pretrained(source, **where)
        stored = getattr(known, "dtype", None) or torch.float32
        options = {"quantization_config": quantization} if quantization else {}
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype or stored, **options, **where
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise _not_loaded(name, source, error) from error
    tokenizer = load_tokenizer(name)
    model.requires_grad_(False)
    model.train(False)
    return BaseModel(name, model, tokenizer, stored, fingerprint(model))


def empty_base(name: str, local_files_only: bool = False) -> BaseModel:
    """The architecture alone, built on the current torch device: on `meta` it takes no memory.
    With `local_files_only` the hub is not asked, nor is one that does not answer.

    Raises UsageError where its configuration cannot be found, LoragenError where it is not one.
    """
    quiet_libraries()
    from transformers import AutoConfig, AutoModelForCausalLM

    source = resolve_base(name)
    where = {"local_files_only": True} if local_files_only else _where(name)
    try:
        config = AutoConfig.from_pretrained(source, **where)
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]  # theirs
    except (OSError, ValueError) as error:
        raise _not_loaded(name, source, error) from error
    model.requires_grad_(False)
    return BaseModel(name, model, None, model.dtype, "")


def _where(name: str) -> dict[str, bool]:
    """A hub that does not answer is not asked again: what was downloaded before is all there is."""
    silent = not Path(resolve_base(name)).is_dir() and silence()
    return {"local_files_only": True} if silent else {}


def fingerprint(model: Any, values: int = 512) -> str:
    """A hash of names, shapes and an even sample of `values` of every weight, in float32: the same
    for the same weights however they are stored in files, in 32 bits or fewer.

    Reading all of a large model would take longer than a training step; fine-tuning moves nearly
    every weight, so a sample tells.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // values)].float().cpu()
        digest.update(f"{name}:{tuple(weight.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def load_tokenizer(name: str) -> Any:
    """A base's tokenizer; the model itself is not needed for it.

    Raises UsageError where it cannot be found, LoragenError where it does not load.
    """
    quiet_libraries()
    from transformers import AutoTokenizer

    source = resolve_base(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **_where(name))
        if not tokenizer("a").input_ids:  # transformers makes an empty one of missing files
            raise ValueError("its tokenizer makes no tokens of a text; is tokenizer.json missing?")
    except (OSError, ValueError) as error:
        raise _not_loaded(name, source, error) from error
    return tokenizer


def _not_loaded(name: str, source: str, error: Exception) -> LoragenError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if Path(source).is_dir():
        return LoragenError(f"base model {name} does not load: {reason}")
    asked = "the hub says: "
    return UsageError(
        f"base model {name}: not a directory, and {silence() or asked + reason}"
        f"{did_you_mean(name, [DEMO])} (--base-model takes a directory, too, or demo)"
    )
