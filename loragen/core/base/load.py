"""Base models: from a name to the frozen model and its tokenizer, in the dtype that trains best."""

import hashlib
import logging
import os
import warnings
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Any, get_args

import psutil
import torch

from loragen.core.base.names import BaseDtype, is_gguf, resolve_base
from loragen.core.config import DEMO, LoraTrainConfig
from loragen.core.contents import read_json, safetensors_fault
from loragen.core.data.chat import state_of
from loragen.core.errors import (
    DataError,
    LoragenError,
    UsageError,
    did_you_mean,
    first_line,
    pip_install,
)
from loragen.core.hub import hub_problem

NOISY = (
    "lightning.pytorch",
    "lightning.fabric",
    "transformers",
    "sentence_transformers",
    "peft",
    "huggingface_hub",
)
WEIGHTS = tuple(
    f"{stem}{index}"
    for stem in ("model.safetensors", "pytorch_model.bin")
    for index in ("", ".index.json")
)
"""The files with weights of which a base on the hub has one."""
CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""The files with the limit of memory (bytes) and with what is used of it, of both versions."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
PRECISION_DTYPES = {"bf16-true": "bfloat16", "64-true": "float64"}
BFLOAT16_FROM = 100_000_000
"""Parameters from which `auto` chooses bfloat16: between the two sizes measured in `benchmarks/`,
0.6 M, where it is slower than float32, and 0.5 B, where it is faster."""


@dataclass
class LanguageModel:
    """A causal language model as loaded, frozen, and its tokenizer."""

    name: str
    model: Any
    tokenizer: Any
    dtype: torch.dtype
    """The dtype of the stored weights, in which a merged model is saved."""
    fingerprint: str
    """A hash of the weights as stored; bases with the same fingerprint train alike."""
    trust_remote_code: bool = False
    """Whether Python code that came with it may have run."""


def load_base(
    name: str,
    dtype: torch.dtype | None = None,
    quantization: Any | None = None,
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Loads a frozen model in `dtype` (default: as stored), on the CPU, in eval mode.

    With a `quantization` configuration of transformers it is on the GPU instead. Code that a base
    brings along runs with `trust_remote_code` alone. Raises UsageError if the base cannot be found
    or needs that code, LoragenError if it does not load.
    """
    quiet_libraries()
    from transformers import AutoConfig, AutoModelForCausalLM

    source = _loadable(name)
    options = {**_cache_options(source), "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(source, **options)
        stored = getattr(config, "dtype", None) or torch.float32
        if quantization:
            options["quantization_config"] = quantization
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype or stored, **options)
    except Exception as error:  # the libraries raise what they meet in a file
        raise _not_loaded(name, source, error) from error
    tokenizer = load_tokenizer(name, trust_remote_code)
    model.requires_grad_(False)
    model.train(False)
    refuse_nan(name, model)
    return LanguageModel(name, model, tokenizer, stored, fingerprint(model), trust_remote_code)


def refuse_nan(name: str, model: Any) -> None:
    """Raises LoragenError that names the first weight of a base with NaN or infinity in it,
    which would give an accuracy of 0, or a training that diverges. 540 MB take 0.15 s."""
    for key, weight in model.named_parameters():
        if weight.is_floating_point() and weight.numel():
            low, high = weight.detach().aminmax()  # both are NaN if one value is
            if not (isfinite(low) and isfinite(high)):
                raise LoragenError(
                    f"base model {name}: {key} has NaN or infinity in it; its file is damaged, or "
                    "was saved from a training that had diverged"
                )


def empty_base(
    name: str, local_files_only: bool = False, trust_remote_code: bool = False
) -> LanguageModel:
    """Builds the architecture without its weights, on the current torch device; on `meta` it takes
    no memory. With `local_files_only` nothing is downloaded.

    Raises UsageError if its configuration cannot be found or needs code that is not trusted,
    LoragenError if it is not valid.
    """
    quiet_libraries()
    from transformers import AutoConfig, AutoModelForCausalLM

    source = _loadable(name)
    cache = {"local_files_only": True} if local_files_only else _cache_options(source)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **cache)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)  # type: ignore[no-untyped-call]  # untyped in transformers
    except Exception as error:  # the libraries raise what they meet in a file
        raise _not_loaded(name, source, error) from error
    model.requires_grad_(False)
    return LanguageModel(name, model, None, model.dtype, "")


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """Loads the tokenizer of a base without its model.

    Raises UsageError if it cannot be found or needs code that is not trusted, LoragenError if it
    does not load.
    """
    quiet_libraries()
    from transformers import AutoConfig, AutoTokenizer

    source = _loadable(name)
    options = {**_cache_options(source), "trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        if not tokenizer("a").input_ids:  # if files are missing, transformers makes an empty one
            raise ValueError("its tokenizer returns no tokens; is tokenizer.json missing?")
    except Exception as error:  # the libraries raise what they meet in a file
        raise _not_loaded(name, source, error) from error
    with suppress(Exception):  # a directory may have a tokenizer alone
        config = AutoConfig.from_pretrained(source, **options)
        if isinstance(vocabulary := getattr(config.get_text_config(), "vocab_size", None), int):
            state_of(tokenizer).embeddings = vocabulary
    return tokenizer


def tokenizer_in(directory: Path) -> Any:
    """Loads the tokenizer of a directory that need not be a base, such as that of an adapter.

    Raises LoragenError if it does not load.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise LoragenError(
            f"{directory}: its tokenizer does not load: {first_line(error)}"
        ) from error


def _loadable(name: str) -> str:
    """Returns what transformers loads: a directory, to which a GGUF file is dequantised, or a hub
    id. Raises UsageError if there is no such path, LoragenError if the GGUF file is broken."""
    source = resolve_base(name)
    if not is_gguf(source):
        return source
    from loragen.core.base.gguf import dequantized

    return str(dequantized(Path(source)))


def _not_loaded(name: str, source: str, error: Exception) -> LoragenError:
    if "trust_remote_code=True" in str(error):  # the only way in which transformers says so
        return UsageError(
            f"base model {name}: it needs Python code of its own, which is not run without "
            "--trust-remote-code (trust_remote_code: true in the YAML); read it first"
        )
    reason = first_line(error)
    if isinstance(error, LookupError | TypeError | AttributeError):  # their texts alone say little
        reason = f"{type(error).__name__}: {reason}"
    if "Weights only load failed" in reason:  # torch's advice is to load it nevertheless
        reason = "its weights hold more than tensors and plain data, and loading them may run code"
    if "ignore_mismatched_sizes" in reason:
        reason = "its weights have other shapes than its config.json says, such as vocab_size"
    if Path(source).is_dir():
        return LoragenError(f"base model {name} does not load: {_fault_in(Path(source)) or reason}")
    return UsageError(
        f"base model {name}: not a directory, and {hub_problem() or f'the hub says: {reason}'}"
        f"{did_you_mean(name, [DEMO])} (--base-model also takes a directory, a GGUF file, or demo)"
    )


def is_local(name: str) -> bool:
    """Returns whether a base is on this machine, as a directory, as a GGUF file or in the hub's
    cache, with its weights, because a dry run has downloaded the configuration alone."""
    from huggingface_hub import try_to_load_from_cache

    try:
        source = resolve_base(name)
    except UsageError:  # a directory that does not exist
        return False
    cached = (try_to_load_from_cache(source, file) for file in WEIGHTS)
    return Path(source).exists() or any(isinstance(file, str) for file in cached)


def _cache_options(source: str) -> dict[str, bool]:
    """Returns the options by which `from_pretrained` uses only its cache if the hub is offline."""
    offline = not Path(source).is_dir() and hub_problem()
    return {"local_files_only": True} if offline else {}


def fingerprint(model: Any, values: int = 512) -> str:
    """Returns a hash of names, shapes and an even sample of `values` of every weight, in float32.
    It does not depend on the files and the dtype (of up to 32 bits) of the stored weights.

    A sample is enough, because fine-tuning moves nearly every weight, and reading all weights of a
    large model would take longer than a training step.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // values)].float().cpu()
        digest.update(f"{name}:{tuple(weight.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def load_training_base(config: LoraTrainConfig) -> LanguageModel:
    """Loads the base of `lora train`, frozen, in the dtype in which it will compute.

    The adapter's own weights stay in float32 unless `trainer.precision` is one of `*-true`.
    Raises UsageError if the hardware does not allow the configured quantisation.
    """
    name, trusted = config.base_model, config.trust_remote_code
    if config.base_quantization != "none":
        bits = _bits_and_bytes(config)
        return load_base(name, quantization=bits, trust_remote_code=trusted)
    base = load_base(name, trust_remote_code=trusted)
    dtype = base_dtype(config, base.model)
    if base.model.dtype == dtype:
        return base
    # Loaded again, because `.to(dtype)` would also round buffers in float32, such as RoPE's angles.
    stored, base.model = base.fingerprint, None
    return replace(load_base(name, dtype, trust_remote_code=trusted), fingerprint=stored)


def base_dtype(config: LoraTrainConfig, model: Any) -> torch.dtype:
    """Returns the dtype of `trainer.precision` if that is one of `*-true`, else of `base_dtype`;
    `auto` is bfloat16 for a large base on hardware that multiplies it fast, else float32."""
    named = PRECISION_DTYPES.get(config.trainer.precision, config.base_dtype)
    if named != "auto":
        return DTYPES[named]
    large = sum(p.numel() for p in model.parameters()) >= BFLOAT16_FROM
    return torch.bfloat16 if large and fast_bfloat16(config.trainer.accelerator) else torch.float32


def trainer_precision(config: LoraTrainConfig, model: Any) -> str:
    """Returns Lightning's `precision`. With a base in bfloat16 the float32 adapter is multiplied in
    bfloat16 too, because otherwise every activation would be cast for it and cast back."""
    chosen = config.trainer.precision
    return "bf16-mixed" if chosen == "32-true" and model.dtype == torch.bfloat16 else chosen


def fast_bfloat16(accelerator: str) -> bool:
    """Returns whether the hardware has instructions for bfloat16, which is slow if emulated."""
    if accelerator != "cpu" and torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if accelerator != "cpu" and torch.backends.mps.is_available():
        return False
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def dtype_name(dtype: torch.dtype) -> BaseDtype:
    """Returns the name of a dtype in manifests; empty for a dtype that no setting names."""
    names: dict[torch.dtype, BaseDtype] = {DTYPES[name]: name for name in get_args(BaseDtype)[1:]}
    return names.get(dtype, "")


def best_device() -> torch.device:
    """Returns the device that `trainer.accelerator: auto` means: a CUDA GPU, else Apple's, else the
    CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def free_memory(accelerator: str = "cpu") -> int:
    """Returns the bytes that are free on the GPU, if `trainer.accelerator` means one, else on this
    machine or in the control group (container, Slurm job) of this process."""
    if accelerator != "cpu" and torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    free = [psutil.virtual_memory().available]
    for limit, used in CGROUP_FILES:
        with suppress(OSError, ValueError):  # no such file, or its limit is "max"
            free.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
    return max(0, min(free))


def quiet_libraries() -> None:
    """Silences the banners, tips and progress bars of other libraries, but not their errors. It has
    to be called before the first import of lightning or transformers."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # forked workers would deadlock
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
    warnings.filterwarnings("ignore", message=r".*is_gradient_checkpointing.*")
    warnings.filterwarnings("ignore", module=r"lightning\..*")
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # untyped in transformers
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # untyped in transformers


def _fault_in(directory: Path) -> str | None:
    """Returns the first file of a base that is not what its name says, with the reason."""
    for file in sorted(directory.iterdir()):
        if file.suffix == ".json":
            try:
                read_json(file)
            except DataError as error:
                return str(error)
        elif file.suffix == ".safetensors" and (fault := safetensors_fault(file)):
            return f"{file}: {fault}"
    return None


def _bits_and_bytes(config: LoraTrainConfig) -> Any:
    """Returns the configuration of a base in 4 or 8 bits (QLoRA, arXiv 2305.14314)."""
    setting = f"base_quantization: {config.base_quantization}"
    if find_spec("bitsandbytes") is None:
        raise UsageError(f"{setting} needs bitsandbytes: {pip_install('quantization')}")
    if config.trainer.accelerator == "cpu" or not torch.cuda.is_available():
        raise UsageError(f"{setting} needs a CUDA GPU, and there is none here; use base_dtype")
    from transformers import BitsAndBytesConfig

    if config.base_quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]  # untyped in transformers
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]  # untyped in transformers
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
