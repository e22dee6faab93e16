"""Other libraries' banners, tips and progress bars do not belong among our lines.

Which device computes where none is configured.

Base models: from a name to the model, its tokenizer, and nothing more than is needed.

The dtype in which the frozen base computes while an adapter trains.
"""

import hashlib
import logging
import os
import warnings
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from loragen.core.base.names import BaseDtype, resolve_base
from loragen.core.config import DEMO, LoraTrainConfig
from loragen.core.errors import LoragenError, UsageError, did_you_mean
from loragen.core.files import silence

NOISY = (
    "lightning.pytorch",
    "lightning.fabric",
    "transformers",
    "sentence_transformers",
    "peft",
    "huggingface_hub",
)


def quiet_libraries() -> None:
    """Errors still show. Call before the first import of lightning or transformers."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # forked workers would deadlock
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
    warnings.filterwarnings("ignore", message=r".*is_gradient_checkpointing.*")
    warnings.filterwarnings("ignore", module=r"lightning\..*")
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # theirs
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # theirs


def best_device() -> torch.device:
    """As `trainer.accelerator: auto` chooses for training: a CUDA GPU, else Apple's, else the
    CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


WEIGHTS = tuple(
    f"{stem}{index}"
    for stem in ("model.safetensors", "pytorch_model.bin")
    for index in ("", ".index.json")
)
"""The files of which a base on the hub has one."""


@dataclass
class LanguageModel:
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
) -> LanguageModel:
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
    return LanguageModel(name, model, tokenizer, stored, fingerprint(model))


def empty_base(name: str, local_files_only: bool = False) -> LanguageModel:
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
    return LanguageModel(name, model, None, model.dtype, "")


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


FROM_PARAMETERS = 100_000_000
"""A choice between the two sizes measured in `benchmarks/`: bfloat16 loses at 0.6 M parameters and
wins at 0.5 B."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
OF_PRECISION = {"bf16-true": "bfloat16", "64-true": "float64"}


def load_training_base(config: LoraTrainConfig) -> LanguageModel:
    """The base of a collection, frozen, in the dtype that it is to compute in.

    The adapter's own weights stay in float32 unless `trainer.precision` is one of `*-true`.
    Raises UsageError where the hardware cannot do what was asked.
    """
    if config.base_quantization != "none":
        return load_base(config.base_model, quantization=_quantization(config))
    base = load_base(config.base_model)
    dtype = base_dtype(config, base.model)
    if base.model.dtype == dtype:
        return base
    # Loaded anew: `.to(dtype)` would also round what models keep in float32, such as RoPE's angles.
    stored, base.model = base.fingerprint, None
    return replace(load_base(config.base_model, dtype), fingerprint=stored)


def base_dtype(config: LoraTrainConfig, model: Any) -> torch.dtype:
    """`trainer.precision` where it is about the weights, then `base_dtype`; `auto` takes bfloat16
    for a large base on hardware that multiplies it fast, and float32 otherwise."""
    named = OF_PRECISION.get(config.trainer.precision, config.base_dtype)
    if named != "auto":
        return DTYPES[named]
    large = sum(p.numel() for p in model.parameters()) >= FROM_PARAMETERS
    return torch.bfloat16 if large and fast_bfloat16(config.trainer.accelerator) else torch.float32


def arithmetic(config: LoraTrainConfig, model: Any) -> str:
    """Lightning's `precision`. Beside a base in bfloat16 the float32 adapter is multiplied in
    bfloat16 too: otherwise every activation would be widened for it and narrowed again."""
    asked = config.trainer.precision
    return "bf16-mixed" if asked == "32-true" and model.dtype == torch.bfloat16 else asked


def fast_bfloat16(accelerator: str) -> bool:
    """Whether the hardware has instructions for bfloat16; emulated, it is slower than float32."""
    if accelerator != "cpu" and torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if accelerator != "cpu" and torch.backends.mps.is_available():
        return False
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def dtype_name(dtype: torch.dtype) -> BaseDtype:
    """As the manifest has it; empty for one that no setting asks for."""
    names: dict[torch.dtype, BaseDtype] = {
        torch.float32: "float32",
        torch.bfloat16: "bfloat16",
        torch.float64: "float64",
    }
    return names.get(dtype, "")


def _quantization(config: LoraTrainConfig) -> Any:
    """What transformers is told of a base in 4 or 8 bits (QLoRA, arXiv 2305.14314)."""
    asked = f"base_quantization: {config.base_quantization}"
    if find_spec("bitsandbytes") is None:
        raise UsageError(f"{asked} needs bitsandbytes: pip install 'loragen[quantization]'")
    if config.trainer.accelerator == "cpu" or not torch.cuda.is_available():
        raise UsageError(f"{asked} needs a CUDA GPU, and there is none here; use base_dtype")
    from transformers import BitsAndBytesConfig

    if config.base_quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]  # theirs
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]  # theirs
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
