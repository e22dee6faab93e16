"""LoRA adapters as other people have them: every kind that PEFT writes, and broken ones.

from loragen.testing.adapters import broken, peft_adapter

adapter = peft_adapter(tmp_path / "dora", use_dora=True)
bad = broken(peft_adapter(tmp_path / "plain"), "nan")
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import loragen

if TYPE_CHECKING:
    from torch import Tensor

    Tensors = dict[str, Tensor]

DEMO_BASE = Path(loragen.__file__).parent / "demo" / "base"
"""The tiny base model that ships with loragen."""

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "all-linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*\.0\.self_attn\.(q|v)_proj"},
    "one layer": {"layers_to_transform": [1]},
    "eva": {"init_lora_weights": "eva"},
    "dora": {"use_dora": True},
    "bias": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "saved norm": {"modules_to_save": ["norm"]},
    "saved head": {"modules_to_save": ["lm_head"]},
    "saved embedding": {"modules_to_save": ["embed_tokens"]},
    "token indices": {"trainable_token_indices": [3, 5]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "replicated layers": {"layer_replication": [[0, 1], [0, 2]]},
    "alora": {"alora_invocation_tokens": [7]},
    "parameters": {"target_modules": [], "target_parameters": ["q_proj.weight"]},
}
"""{name: options of PEFT's `LoraConfig`}; see `peft_adapter`."""


def peft_adapter(
    directory: Path,
    base_model: Path | str = DEMO_BASE,
    *,
    seed: int = 0,
    vocabulary: int | None = None,
    dtype: str | None = None,
    **options: Any,
) -> Path:
    """Writes an adapter by plain PEFT, as if it had been trained, and returns the directory.

    All that would be trained has normal noise of 0.05. `vocabulary` resizes that of the base before
    the adapter is made, and `dtype` casts its tensors; `options` are those of `LoraConfig`.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    usual = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(
            base_model, dtype=torch.float32, trust_remote_code=False
        )
        if vocabulary:
            base.resize_token_embeddings(vocabulary)
        lora = LoraConfig(task_type="CAUSAL_LM", **{**usual, **options})
        model = get_peft_model(base, lora)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(str(directory))
    if dtype:
        rewritten(
            directory, tensors=lambda t: {k: v.to(getattr(torch, dtype)) for k, v in t.items()}
        )
    return directory


def rewritten(
    directory: Path,
    config: Mapping[str, Any] | None = None,
    tensors: Callable[[Tensors], Tensors] | None = None,
) -> Path:
    """Changes an adapter in place, and returns its directory.

    `config` are new values of adapter_config.json; `tensors` gets all tensors and returns new ones.
    """
    from safetensors.torch import load_file, save_file

    file = directory / "adapter_config.json"
    if config:
        document = json.loads(file.read_text(encoding="utf-8")) | config
        file.write_text(json.dumps(document), encoding="utf-8")
    if tensors:
        weights = directory / "adapter_model.safetensors"
        changed = {key: t.contiguous() for key, t in tensors(load_file(weights)).items()}
        save_file(changed, weights, {"format": "pt"})
    return directory


def broken(directory: Path, fault: str) -> Path:
    """Breaks an adapter in place by one of `FAULTS`, and returns its directory."""
    return rewritten(directory, **FAULTS[fault])


def _only(matrix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: t for key, t in tensors.items() if matrix in key}


def _each(matrix: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k: change(t) if matrix in k else t for k, t in tensors.items()}


def _one(matrix: str, value: float) -> Callable[[Tensors], Tensors]:
    """Replaces one value of the last tensor of a kind."""

    def change(tensors: Tensors) -> Tensors:
        tensors[max(key for key in tensors if matrix in key)][-1, -1] = value
        return tensors

    return change


def _renamed(change: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {change(key): t for key, t in tensors.items()}


NAN, INFINITY = float("nan"), float("inf")
FAULTS: dict[str, dict[str, Any]] = {
    "nan": {"tensors": _one("lora_B", NAN)},
    "nan in A": {"tensors": _one("lora_A", NAN)},
    "infinity": {"tensors": _one("lora_A", -INFINITY)},
    "empty": {"tensors": lambda _: {}},
    "zero": {"tensors": _each("lora_", lambda t: t * 0)},
    "never moved": {"tensors": _each("lora_B", lambda t: t * 0)},
    "hardly moved": {"tensors": _each("lora_B", lambda t: t * 1e-20)},
    "alpha nan": {"config": {"lora_alpha": NAN}},
    "alpha infinite": {"config": {"lora_alpha": INFINITY}},
    "alpha true": {"config": {"lora_alpha": True}},
    "alpha text": {"config": {"lora_alpha": "8"}},
    "alpha pattern nan": {"config": {"alpha_pattern": {"q_proj": NAN}}},
    "rank zero": {"config": {"r": 0}},
    "rank negative": {"config": {"r": -4}},
    "rank true": {"config": {"r": True}},
    "rank half": {"config": {"r": 8}},
    "rank pattern": {"config": {"rank_pattern": {"q_proj": 3}}},
    "rank pattern zero": {"config": {"rank_pattern": {"q_proj": 0}}},
    "B transposed": {"tensors": _each("lora_B", lambda t: t.T)},
    "A transposed": {"tensors": _each("lora_A", lambda t: t.T)},
    "both transposed": {"tensors": _each("lora_", lambda t: t.T)},
    "only A": {"tensors": _only("lora_A")},
    "only B": {"tensors": _only("lora_B")},
    "one B missing": {"tensors": lambda t: {k: v for k, v in t.items() if k != max(t)}},
    "flat": {"tensors": _each("lora_A", lambda t: t.reshape(-1))},
    "integers": {"tensors": _each("lora_A", lambda t: t.char())},
    "no prefix": {"tensors": _renamed(lambda key: key.removeprefix("base_model.model."))},
    "half a prefix": {"tensors": _renamed(lambda key: key.removeprefix("base_model."))},
}
"""{name: arguments of `rewritten`}; "zero", "never moved" and "hardly moved" change nothing of the
base, and all others are no adapters."""
