"""What an adapter is: its configuration and tensors are judged here, for every command.

`check_config` and `check_factors` refuse what no command can use; every reader calls them. Beyond
that, commands differ. PEFT computes with more kinds of LoRA than ΔW = s · B A, so `lora eval` and
`lora export` leave those to it, and so they do adapters of `OTHER_METHODS`. What learns from ΔW, or
measures it, refuses them (`check_ba`).
"""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, fields
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from loragen.core.adapter import KEY_PREFIX
from loragen.core.errors import DataError, listing

log = logging.getLogger(__name__)

NOTHING = 1e-8
"""An adapter that changes no weight of the base by more is as good as none: neighbouring
float32 values near 0.1 are 7e-9 apart."""
FACTOR = re.compile(r"\.lora_(?:embedding_)?([AB])(?:\.weight)?$")
"""The end of the key of an A or a B."""
LIVE_KEY = re.compile(r"\.(lora_(?:[AB]|embedding_[AB]|magnitude_vector))\.([^.]+)(\.\w+)?$")
"""The end of a key of a live model, with the adapter's name: `.lora_A.default.weight`."""
TENSOR_KINDS = {"lora_magnitude_vector": "DoRA", "lora_B.bias": "lora_bias", ".bias": "bias"}
"""{part of a key: the kind of adapter that has such a tensor}"""
OTHER_SHAPES = ("target_parameters", "use_bdlora")
"""Fields of `LoraConfig` with which the shapes of A and B are not [r, in] and [out, r]."""
OTHER_METHODS = ("ADALORA", "IA3", "LOHA", "LOKR")
"""Methods of PEFT beside LoRA, which PEFT attaches and merges."""
NOT_BA = {
    "use_dora": "DoRA",
    "bias": "bias",
    "modules_to_save": "modules_to_save",
    "trainable_token_indices": "trainable_token_indices",
    "lora_bias": "lora_bias",
    "alora_invocation_tokens": "aLoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "target_parameters": "target_parameters",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
}
"""{field of `LoraConfig`: the kind of adapter, whose change of the base is not s · B A}"""
KEEPS_BASE = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base as it is. The others, such as PiSSA, take the
initial B A out of its weights, and ΔW is what training has added to that."""
KNOWN_FIELDS = {
    *NOT_BA,
    "layer_replication",
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path"),
    *("revision", "inference_mode", "r", "lora_alpha", "lora_dropout", "target_modules"),
    *("exclude_modules", "fan_in_fan_out", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("layers_to_transform", "layers_pattern", "init_lora_weights", "loftq_config", "eva_config"),
    *("corda_config", "lora_ga_config", "megatron_config", "megatron_core", "runtime_config"),
    *("qalora_group_size", "ensure_weight_tying"),
}


# ---------------------------------------------------------------------------- configuration


def module_value(config: Mapping[str, Any], name: str, module: str) -> float:
    """Returns `r` or `lora_alpha` of a module: as in PEFT (`get_pattern_key`), the first pattern of
    `rank_pattern` or `alpha_pattern` that matches the end of its path replaces the adapter's."""
    patterns = config.get("rank_pattern" if name == "r" else "alpha_pattern") or {}
    matching = (v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", module))
    value: float = next(matching, config[name])
    return value


def module_scaling(config: Mapping[str, Any], module: str) -> float:
    """Returns the factor of B A: alpha / r, or alpha / √r with rsLoRA.

    PEFT itself computes it only when the adapter is attached to a base model.
    """
    rank = module_value(config, "r", module)
    return float(
        module_value(config, "lora_alpha", module)
        / (rank**0.5 if config.get("use_rslora") else rank)
    )


def check_config(config: object, origin: object) -> None:
    """Raises DataError naming the first key of PEFT's configuration with an impossible value."""
    if not isinstance(config, dict):
        raise DataError(f"{origin}: expected a JSON object, found {type(config).__name__}")
    kind = config.get("peft_type", "LORA")
    if kind not in ("LORA", *OTHER_METHODS):
        others = listing(OTHER_METHODS)
        raise DataError(f"{origin}: peft_type is {kind}; LORA is supported, and in part {others}")
    base = config.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise DataError(f"{origin}: base_model_name_or_path must be a string (it is {base!r})")
    if kind != "LORA":
        return
    values: list[tuple[str, str, Any]] = []
    for name, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        values.append((name, name, config.get(name)))
        patterns = config.get(pattern) or {}
        if not isinstance(patterns, dict):
            raise DataError(f"{origin}: {pattern} must be an object (it is {patterns!r})")
        for one, value in patterns.items():
            try:
                re.compile(one)
            except re.error as error:
                raise DataError(
                    f"{origin}: {pattern}: {one!r} is not a regular expression: {error}"
                ) from None
            values.append((name, f"{pattern}[{one!r}]", value))
    targets = config.get("target_modules")
    names = targets if isinstance(targets, list) else [targets or ""]
    if not all(isinstance(one, str) for one in names):
        raise DataError(f"{origin}: target_modules must be a list of names (it is {targets!r})")
    called = config.get("alora_invocation_tokens")
    if called is not None and not (
        isinstance(called, list) and called and all(type(one) is int for one in called)
    ):
        raise DataError(
            f"{origin}: alora_invocation_tokens must be a list of token ids (it is {called!r})"
        )
    for name, key, value in values:
        if name == "r" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise DataError(f"{origin}: {key} must be a whole number above 0 (it is {value!r})")
        if name == "lora_alpha" and not _is_finite_number(value):
            raise DataError(f"{origin}: {key} must be a finite number (it is {value!r})")


def _is_finite_number(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def warn_of_config(config: Mapping[str, Any], origin: object) -> None:
    """Warns of what may compute something else than its author saw: fields that the installed PEFT
    lacks, initial weights that it cannot repeat, and a negative alpha."""
    if config.get("peft_type", "LORA") != "LORA":
        return
    if unknown := sorted(key for key, v in config.items() if v and key not in KNOWN_FIELDS):
        from peft import LoraConfig

        installed = {field.name: field for field in fields(LoraConfig)}
        lacking = [key for key in unknown if key not in installed]
        chosen = [
            key
            for key in unknown
            if key in installed and not _is_default(installed[key], config[key])
        ]
        if lacking:
            log.warning(
                "%s: the installed PEFT has no field %s and ignores it: the adapter may be of a "
                "newer PEFT, and compute something else there (pip install --upgrade peft)",
                origin,
                listing(lacking),
            )
        if chosen:
            log.warning("%s: loragen does not know %s; PEFT does", origin, listing(chosen))
    initial = config.get("init_lora_weights")
    if isinstance(initial, str) and (
        initial.startswith("pissa_niter") or initial in ("corda", "loftq", "lora_ga")
    ):
        log.warning(
            "%s: init_lora_weights is %s: it was trained on a changed base, which PEFT cannot make "
            "again exactly; save it with path_initial_model_for_weight_conversion",
            origin,
            initial,
        )
    if config["lora_alpha"] < 0:
        log.warning("%s: lora_alpha is %g: ΔW is subtracted", origin, config["lora_alpha"])


def _is_default(field: Any, value: object) -> bool:
    default = field.default if field.default is not MISSING else field.default_factory()
    return bool(default == value)


# ---------------------------------------------------------------------------- keys and shapes


def file_keys(tensors: Mapping[str, Tensor], origin: object) -> dict[str, Tensor]:
    """Converts the keys of an adapter to those of PEFT's files, without a live model.

    A Lightning checkpoint adds the prefix ``model.``, and a live model has the adapter's name,
    ``default``, in its keys, and ``.weight`` after a DoRA vector; a file has none of these. File
    keys stay as they are. Raises DataError for keys of another form, and for several adapters.
    """
    found: dict[str, Tensor] = {}
    names: set[str] = set()
    for key, tensor in tensors.items():
        name = key.removeprefix("model.") if key.startswith(f"model.{KEY_PREFIX}") else key
        if not name.startswith(KEY_PREFIX):
            raise DataError(
                f"{origin}: the key {key} is not of PEFT's form, "
                f"{KEY_PREFIX}<path of the module>.lora_A.weight"
            )
        live = LIVE_KEY.search(name)
        if live and (live[3] or live[2] not in ("weight", "bias")):
            names.add(live[2])
            name = f"{name[: live.start()]}.{live[1]}{live[3] or ''}"
        elif "lora_" in name:
            name = re.sub(r"\.default(?=\.|$)", "", name)
        name = re.sub(r"(lora_magnitude_vector)\.weight$", r"\1", name)
        if name in found or len(names) > 1:
            several = listing(sorted(names)) if len(names) > 1 else key
            raise DataError(f"{origin}: several adapters in one file: {several}")
        found[name] = tensor
    return found


def module_of(key: str) -> str:
    """Returns the path, in the base model, of the module that a LoRA tensor belongs to."""
    return key.removeprefix(KEY_PREFIX).partition(".lora_")[0]


def factor_keys(tensors: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yields the keys of A and B of every module, in the order of A."""
    for key in tensors:
        matrix, other = FACTOR.search(key), _partner(key)
        if matrix and other and matrix[1] == "A":
            yield key, other


def _partner(key: str) -> str | None:
    """Returns the key of the B that belongs to an A, or the reverse; None for other tensors."""
    matrix = FACTOR.search(key)
    if not matrix:
        return None
    return f"{key[: matrix.start(1)]}{'B' if matrix[1] == 'A' else 'A'}{key[matrix.end(1) :]}"


def check_factors(
    config: Mapping[str, Any] | None, tensors: Mapping[str, Tensor], origin: object
) -> None:
    """Raises DataError naming the first tensor without its partner, of no floating-point dtype, or
    of another shape than the rank in `config` says.

    Without a `config`, the ranks of A and B have to agree.
    """
    if (config or {}).get("peft_type", "LORA") != "LORA":
        return
    if not any("lora_" in key for key in tensors):
        raise DataError(f"{origin}: no LoRA tensors in it (no key has 'lora_')")
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise DataError(f"{origin}: {key}: {tensor.dtype} is not a floating-point dtype")
        other = _partner(key)
        if other and other not in tensors:
            raise DataError(f"{origin}: it has {key} and no {other}")
    if any((config or {}).get(field) for field in OTHER_SHAPES):
        return
    for key_a, key_b in factor_keys(tensors):
        a, b = list(tensors[key_a].shape), list(tensors[key_b].shape)
        whole = len(a) > 1 and len(b) > 1
        rank = int(module_value(config, "r", module_of(key_a))) if config else (a or [0])[0]
        if whole and rank != a[0] == b[1]:
            raise DataError(
                f"{origin}: r is {rank} for {module_of(key_a)}, and its tensors have rank {a[0]}"
            )
        for key, shape, axis in ((key_a, a, 0), (key_b, b, 1)):
            if len(shape) < 2 or shape[axis] != rank or 0 in shape:
                expected = f"[{rank}, in]" if axis == 0 else f"[out, {rank}]"
                why = " (transposed)" if len(shape) == 2 and shape[1 - axis] == rank else ""
                raise DataError(f"{origin}: {key} has shape {shape}{why}, expected {expected}")


# ---------------------------------------------------------------------------- kinds and values


def not_ba(config: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> str | None:
    """Returns why the change of the base is not s · B A, such as `DoRA: ΔW is not BA`; None if it
    is. `tensors` alone, with an empty `config`, do not tell all."""
    if (method := config.get("peft_type", "LORA")) != "LORA":
        return f"{method}: ΔW is not BA"
    for field, kind in NOT_BA.items():
        if config.get(field) and config[field] != "none":
            return f"{kind}: ΔW is not BA"
    if config.get("layer_replication"):
        return "layer_replication: ΔW is of other layers than those of the base"
    initial = config.get("init_lora_weights")
    if initial not in KEEPS_BASE:
        return f"init_lora_weights {initial}: ΔW is not BA, but BA minus the initial BA"
    for key, tensor in (tensors or {}).items():
        if not FACTOR.search(key):
            kind = next((k for part, k in TENSOR_KINDS.items() if part in key), "")
            if not kind and "lora_" not in key:
                kind = "weights of the base, which PEFT leaves out with save_embedding_layers=False"
            return f"{kind or 'other tensors than A and B'}: ΔW is not BA ({key})"
        if tensor.ndim != 2:
            return f"{key} has {tensor.ndim} dimensions: ΔW is not the product of two matrices"
    return None


def check_ba(config: Mapping[str, Any], tensors: Mapping[str, Tensor], origin: object) -> None:
    """Raises DataError with the reason if the change of the base is not s · B A."""
    if reason := not_ba(config, tensors):
        raise DataError(f"{origin}: {reason}; only lora eval and lora export take it")


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Returns the keys of the tensors with NaN or infinity."""
    wide = {key: t if t.element_size() > 1 else t.float() for key, t in tensors.items()}
    return [key for key, tensor in wide.items() if not torch.isfinite(tensor).all()]


def check_finite(tensors: Mapping[str, Tensor], origin: object) -> None:
    """Raises DataError naming the tensors with NaN or infinity."""
    if bad := not_finite(tensors):
        raise DataError(f"{origin}: NaN or infinity in {listing(bad, 2)}")


def changes_nothing(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """Returns whether no weight of the base changes by more than `NOTHING`, because the adapter is
    zero or was never trained. False for one that is not s · B A."""
    if not_ba(config, tensors):
        return False

    def bound(key_a: str, key_b: str) -> float:
        """Returns what no value of a module's ΔW exceeds."""
        largest = [float(tensors[key].double().abs().max()) for key in (key_a, key_b)]
        scaling = module_scaling(config, module_of(key_a)) if config else 1.0
        return abs(scaling) * len(tensors[key_a]) * largest[0] * largest[1]

    return all(bound(*keys) <= NOTHING for keys in factor_keys(tensors))
