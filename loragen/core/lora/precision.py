"""The dtype in which the frozen base computes while an adapter trains."""

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch

from loragen.core.base_models import BaseModel, load_base
from loragen.core.config import LoraTrainConfig
from loragen.core.errors import UsageError
from loragen.core.manifests import BaseDtype

FROM_PARAMETERS = 100_000_000
"""A choice between the two sizes measured in `benchmarks/`: bfloat16 loses at 0.6 M parameters and
wins at 0.5 B."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
OF_PRECISION = {"bf16-true": "bfloat16", "64-true": "float64"}


def load_training_base(config: LoraTrainConfig) -> BaseModel:
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
