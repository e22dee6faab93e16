"""Reads a LoRA adapter from a checkpoint without a configuration.

Rank and target modules follow from the tensors, alpha and the base model from the files beside them
or from flags.
"""

import logging
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import ValidationError

from loragen.core.adapter import KEY_PREFIX
from loragen.core.adapter.files import (
    Adapter,
    fitting_shapes,
    peft_config,
    plain_config,
    shape_mismatch,
)
from loragen.core.base.load import empty_base
from loragen.core.base.names import resolve_base
from loragen.core.config.load import problems_of
from loragen.core.config.schema import LoraSection
from loragen.core.config.yaml_file import Loc
from loragen.core.errors import ConfigError, DataError, LoragenError, UsageError
from loragen.core.run.checkpoints import instead
from loragen.legacy.checkpoints import Shapes, read_legacy_checkpoint, shapes_of
from loragen.legacy.experiments import (
    LegacyRun,
    RecordedSetting,
    RecordedSettings,
    find_weights,
    log_origins,
    settings_beside,
    settings_in_adapter_config,
)

log = logging.getLogger(__name__)


def read_lone_adapter(
    path: Path, base_model: str | None, alpha: float | None, trust_remote_code: bool = False
) -> Adapter:
    """Reads an adapter from a file or directory that belongs to no run of loragen.

    `base_model` and `alpha` take precedence over what is recorded beside the file.
    Raises UsageError if one of them is missing, DataError if the tensors do not fit the base.
    """
    if not find_weights(path):
        raise UsageError(f"{path}: no adapter or checkpoint in the directory{instead(path)}")
    directory = path.parent if path.is_file() else path
    run = LegacyRun(directory, [path], single_file=path.is_file())
    tensors = read_legacy_checkpoint(path).tensors
    settings = {
        **settings_beside(run),
        **settings_in_adapter_config(run),
        **flag_settings(base_model, alpha),
    }
    shapes = shapes_of(tensors)
    rank, targets, _ = infer_lora(settings, shapes, path, trust_remote_code)
    alpha, origin = settings["lora.alpha"]
    try:
        lora = LoraSection(rank=rank, alpha=alpha, target_modules=targets)
    except ValidationError as error:
        origins: dict[Loc, str] = {("lora", "alpha"): origin}
        raise ConfigError(*problems_of(LoraSection, error, origins, ("lora",))) from None
    return Adapter(plain_config(peft_config(lora, settings["base_model"].value)), tensors)


def flag_settings(base_model: str | None, alpha: float | None) -> RecordedSettings:
    """Returns the settings that the user gave as flags."""
    given = {
        "base_model": RecordedSetting(base_model, "--base-model"),
        "lora.alpha": RecordedSetting(alpha, "--alpha"),
    }
    return {key: setting for key, setting in given.items() if setting.value is not None}


class InferredLora(NamedTuple):
    rank: int
    target_modules: list[str]
    """Names such as `q_proj` if all layers have the same modules, otherwise full paths."""
    order: list[str] | None
    """The tensors' keys in the order of the base's modules; None if the base is not available."""


def infer_lora(
    settings: RecordedSettings, shapes: Shapes, path: Path, trust_remote_code: bool = False
) -> InferredLora:
    """Infers rank and target modules from the shapes, and checks them against the base model.

    The base is built without weights; if it is not on this machine, a warning says that the fit
    is not checked. Raises UsageError if the base or alpha is not recorded, or if the base was
    given as a flag and is no model; DataError if the tensors are incomplete or do not fit.
    """
    flags = {"lora.alpha": "--alpha", "base_model": "--base-model"}
    if missing := [key for key in flags if key not in settings]:
        problems = [
            f"{path}: {key} is not recorded beside it; give {flags[key]}" for key in missing
        ]
        raise UsageError(*problems)
    log_origins(settings, ("base_model", "lora.alpha"))
    base_model, origin = settings["base_model"]
    if origin.startswith("--"):
        resolve_base(base_model)
    ranks_a = {key: shape[0] for key, shape in shapes.items() if ".lora_A." in key}
    ranks_b = {
        key.replace(".lora_B.", ".lora_A."): shape[1]
        for key, shape in shapes.items()
        if ".lora_B." in key
    }
    if unpaired := sorted(ranks_a.keys() ^ ranks_b.keys()):
        raise DataError(f"{path}: {unpaired[0]}: lora_A and lora_B do not come in pairs")
    ranks = sorted({*ranks_a.values(), *ranks_b.values()})
    if ranks_a != ranks_b or len(ranks) != 1:
        raise DataError(f"{path}: several ranks: {ranks}; only one rank can be converted")
    mismatches = []
    for targets in _possible_targets(ranks_a):
        with torch.device("meta"):  # no weights are loaded
            try:
                base = empty_base(base_model, True, trust_remote_code).model
            except UsageError:
                log.warning(
                    "base model %s is not on this machine: the fit and the order of the tensors "
                    "are not checked",
                    base_model,
                )
                return InferredLora(ranks[0], targets, None)
            try:
                wanted = fitting_shapes(base, {"r": ranks[0], "target_modules": targets})
            except LoragenError as error:  # the base does not have these targets
                mismatches.append(str(error))
                continue
        mismatch = shape_mismatch(wanted, shapes)
        if mismatch is None:
            return InferredLora(ranks[0], targets, list(wanted))
        mismatches.append(mismatch)
    raise DataError(f"{path}: does not fit the base model {base_model}: {mismatches[0]}")


def _possible_targets(keys: dict[str, int]) -> list[list[str]]:
    """Returns candidates of `target_modules`: names if all layers have the same, and full paths."""
    paths = [key.removeprefix(KEY_PREFIX).removesuffix(".lora_A.weight") for key in keys]
    layers: dict[str, set[str]] = {}
    for path in paths:
        layer = next((part for part in path.split(".") if part.isdigit()), "")
        layers.setdefault(path.rpartition(".")[2], set()).add(layer)
    all_alike = len({frozenset(numbers) for numbers in layers.values()}) == 1
    return [*([sorted(layers)] if all_alike else []), sorted(paths)]
