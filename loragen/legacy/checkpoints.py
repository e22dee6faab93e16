"""One traditional checkpoint: its adapter tensors, step and optimizer, from whatever holds them."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loragen.core.errors import DataError, LoragenError, listing
from loragen.core.run.checkpoints import load_plain
from loragen.legacy.discover import step_in_name, weights_of

WRAPPERS = ("lora_state_dict", "adapter_state_dict", "model_state_dict", "state_dict", "model")
OPTIMIZERS = ("optimizer_state_dict", "optimizer", "optimizer_states")
STEPS = ("global_step", "step")
SETTINGS = ("config", "hyper_parameters", "args")
PREFIX = "base_model.model."
KEY = re.compile(r"(?P<module>.+)\.lora_(?P<matrix>[AB])(?:\.(?P<rest>.+))?")
OUTER = re.compile(r"^(?:module\.|_orig_mod\.)+")


@dataclass
class LegacyCheckpoint:
    """As read: tensors by PEFT's file keys."""

    tensors: dict[str, Tensor]
    ordered: bool
    """The tensors come in the model's own order, as in a state dict that torch saved."""
    step: int | None = None
    """As the file itself says."""
    optimizer: Any = None
    facts: dict[str, Any] = field(default_factory=dict)
    """Plain settings that were saved with the weights."""


def read_foreign_checkpoint(entry: Path) -> LegacyCheckpoint:
    """The adapter alone: the rest of a full model is mapped, never loaded.

    Raises DataError with the reason where nothing usable is in it.
    """
    files = weights_of(entry)
    if len(files) == 1 and files[0].suffix != ".safetensors":
        return _from_torch(files[0])
    found: dict[str, Tensor] = {}
    for file in files:
        safe = file.suffix == ".safetensors"
        shard = _from_safetensors(file) if safe else _state(load_plain(file))
        if twice := sorted(found.keys() & shard.keys()):
            raise DataError(f"{file}: {twice[0]} is in another shard too")
        found |= shard
    return LegacyCheckpoint(_normalized(found, entry), ordered=False)


def step_of(entry: Path, inside: int | None) -> int | None:
    """`step_080` counts most, then what the file says, then `checkpoint-80`.

    (Some loops count from 0 inside, and people number files their own way.)
    """
    for step in (step_in_name(entry, sure=True), inside, step_in_name(entry)):
        if step is not None:
            return step
    return None


def read_optimizer(entry: Path, inside: Any) -> Any:
    """The optimizer's state dict, saved with the weights or beside them."""
    beside = entry / "optimizer.pt"
    if inside is None and beside.is_file():
        try:
            inside = load_plain(beside)
        except LoragenError:  # the weights are what counts
            return None
    return inside[0] if isinstance(inside, list) and inside else inside


def converted_optimizer(state: Any, tensors: Mapping[str, Tensor], rate: float) -> Any:
    """A torch AdamW state over exactly these tensors, in their order, as our optimizer's own.

    None for anything else. Frozen parameters, which have no state, may be among the legacy ones.
    `rate` is the learning rate of the coming step.
    """
    try:
        moments, groups = state["state"], state["param_groups"]
        used = [group for group in groups if any(p in moments for p in group["params"])]
    except (TypeError, KeyError):
        return None
    if len(used) != 1 or _is_adam_with_l2(used[0]):
        return None
    of = [moments[p] for p in used[0]["params"] if p in moments]
    if len(of) != len(tensors) or not all(map(_fits, of, tensors.values())):
        return None
    options = {k: v for k, v in used[0].items() if k in {"betas", "eps", "weight_decay"}}
    return {
        "state": {index: _moments(one) for index, one in enumerate(of)},
        "param_groups": [
            # What torch.optim.AdamW(lr=1.0) under our schedule would have saved.
            {
                "lr": rate,
                **options,
                "amsgrad": False,
                "maximize": False,
                "foreach": None,
                "capturable": False,
                "differentiable": False,
                "fused": True,
                "decoupled_weight_decay": True,
                "initial_lr": 1.0,
                "params": list(range(len(of))),
            }
        ],
    }


def _fits(state: Any, tensor: Tensor) -> bool:
    if not isinstance(state, Mapping) or set(state) != {"step", "exp_avg", "exp_avg_sq"}:
        return False
    moments = (state["exp_avg"], state["exp_avg_sq"])
    return all(
        isinstance(m, Tensor) and m.shape == tensor.shape and bool(torch.isfinite(m).all())
        for m in moments
    )


def _is_adam_with_l2(group: Mapping[str, Any]) -> bool:
    return bool(group.get("weight_decay")) and not group.get("decoupled_weight_decay", True)


def _moments(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {
        "step": torch.tensor(float(state["step"])),
        "exp_avg": state["exp_avg"].clone(),
        "exp_avg_sq": state["exp_avg_sq"].clone(),
    }


def _from_torch(file: Path) -> LegacyCheckpoint:
    document = load_plain(file)
    saved = (document.get(name) for name in OPTIMIZERS)
    optimizer = next((state for state in saved if isinstance(state, dict | list) and state), None)
    steps = (_whole(document[name]) for name in STEPS if name in document)
    return LegacyCheckpoint(
        tensors=_normalized(_state(document), file),
        ordered=True,
        step=next((step for step in steps if step is not None), None),
        optimizer=optimizer,
        facts=_settings(document, optimizer),
    )


def _settings(document: Mapping[str, Any], optimizer: Any) -> dict[str, Any]:
    """Of the training, as far as they were saved with the weights."""
    settings: dict[str, Any] = {}
    if isinstance(optimizer, Mapping) and optimizer.get("param_groups"):
        settings["weight_decay"] = optimizer["param_groups"][0].get("weight_decay")
    for name in SETTINGS:
        if isinstance(document.get(name), dict):
            settings |= document[name]
    return settings | {k: v for k, v in document.items() if k == "lora_config"}


def _from_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys() if "lora_" in key}  # noqa: SIM118  # no mapping
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file}: not a safetensors file: {error}") from None


def _state(document: Mapping[str, Any]) -> dict[str, Tensor]:
    """The LoRA tensors of a dictionary, or of the first dictionary in it that has some."""
    for candidate in (*(document.get(name) for name in WRAPPERS), document):
        if isinstance(candidate, Mapping):
            found = {
                key: value.detach().clone()  # off the memory map
                for key, value in candidate.items()
                if isinstance(key, str) and "lora_" in key and isinstance(value, Tensor)
            }
            if found:
                return found
    return {}


def _normalized(found: Mapping[str, Tensor], entry: Path) -> dict[str, Tensor]:
    """By PEFT's file keys; live, Lightning's, DataParallel's and bare model keys are known."""
    if not found:
        raise DataError(f"{entry}: no LoRA tensors in it (no key has 'lora_')")
    adapters: dict[str, dict[str, Tensor]] = {}
    for key, tensor in found.items():
        matched = KEY.fullmatch(key)
        if matched is None or tensor.ndim != 2 or not tensor.is_floating_point():
            raise DataError(f"{entry}: {key} is not a matrix of LoRA ('lora_A' or 'lora_B')")
        module = f"{PREFIX}{_module(matched['module'])}"
        name = (matched["rest"] or "").removesuffix("weight").strip(".")
        wanted = f"{module}.lora_{matched['matrix']}.weight"
        adapters.setdefault(name or "default", {})[wanted] = tensor
    if len(adapters) > 1 and "default" not in adapters:
        raise DataError(f"{entry}: several adapters in it, none is 'default': {_names(adapters)}")
    return adapters.get("default") or next(iter(adapters.values()))


def _module(path: str) -> str:
    """The module's path in the base model."""
    _, prefix, inner = path.rpartition(PREFIX)
    if prefix:
        return inner
    inner = OUTER.sub("", path)
    while inner.startswith("model.model."):  # a wrapper's own attribute
        inner = inner.removeprefix("model.")
    return f"model.{inner}" if inner.startswith("layers.") else inner


def _names(adapters: Iterable[str]) -> str:
    return listing(sorted(adapters))


def _whole(value: Any) -> int | None:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return value if isinstance(value, int) and not isinstance(value, bool) else None
