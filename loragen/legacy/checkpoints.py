"""LoRA checkpoints that loragen did not write: read one, or check all of a run.

Any container is read without running code: .pt, .pth, .bin and .ckpt files of `torch.save`,
safetensors files, PEFT and Trainer directories, full models in shards. Of a full model only the
LoRA tensors are loaded.
"""

import re
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loragen.core.adapter import KEY_PREFIX
from loragen.core.adapter.checks import check_finite
from loragen.core.adapter.files import shape_mismatch
from loragen.core.errors import DataError, LoragenError, listing
from loragen.core.run.checkpoints import load_weights_only
from loragen.legacy.experiments import (
    LegacyRun,
    RecordedSettings,
    find_weights,
    is_final_model,
    settings_by_synonyms,
    step_in_name,
)

# The usual keys in the checkpoints of training loops.
TENSOR_KEYS = ("lora_state_dict", "adapter_state_dict", "model_state_dict", "state_dict", "model")
OPTIMIZER_KEYS = ("optimizer_state_dict", "optimizer", "optimizer_states")
STEP_KEYS = ("global_step", "step")
SETTINGS_KEYS = ("config", "hyper_parameters", "args")
LORA_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<matrix>[AB])(?:\.(?P<rest>.+))?")
WRAPPER = re.compile(r"^(?:module\.|_orig_mod\.)+")
"""The prefixes that DataParallel and torch.compile add to a module's path."""

Shapes = dict[str, torch.Size]


@dataclass
class LegacyCheckpoint:
    """The content of one checkpoint."""

    tensors: dict[str, Tensor]
    """The tensors by the keys of PEFT's files."""
    in_model_order: bool
    """The tensors are in the order of the model's modules, as in a state dict of torch."""
    step: int | None = None
    """The step recorded in the file."""
    optimizer: Any = None
    """The optimizer's state dict, saved with the weights or beside them."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the training that were saved with the weights."""


def read_legacy_checkpoint(path: Path) -> LegacyCheckpoint:
    """Reads the LoRA tensors of a file or directory, and what was saved with them.

    Raises DataError if there are none, or other tensors than the A and B matrices of LoRA;
    UsageError for a folder of several checkpoints.
    """
    files = find_weights(path)
    if len(files) == 1 and files[0].suffix != ".safetensors":
        document = load_weights_only(files[0])
        checkpoint = _from_document(document, files[0])
    else:
        found: dict[str, Tensor] = {}
        for file in files:
            is_safe = file.suffix == ".safetensors"
            shard = _read_safetensors(file) if is_safe else _lora_tensors(load_weights_only(file))
            if duplicates := sorted(found.keys() & shard.keys()):
                raise DataError(f"{file}: {duplicates[0]} is in another shard too")
            found |= shard
        checkpoint = LegacyCheckpoint(_by_file_keys(found, path), in_model_order=False)
    beside = path / "optimizer.pt"
    if checkpoint.optimizer is None and beside.is_file():
        with suppress(LoragenError):  # the weights can be used without it
            checkpoint.optimizer = load_weights_only(beside)
    return checkpoint


def _from_document(document: Mapping[str, Any], file: Path) -> LegacyCheckpoint:
    states = [document.get(key) for key in OPTIMIZER_KEYS]
    optimizer = next((state for state in states if isinstance(state, dict | list) and state), None)
    settings: dict[str, Any] = {}
    if isinstance(optimizer, Mapping) and optimizer.get("param_groups"):
        settings["weight_decay"] = optimizer["param_groups"][0].get("weight_decay")
    for key in SETTINGS_KEYS:
        if isinstance(document.get(key), dict):
            settings |= document[key]
    if "lora_config" in document:
        settings["lora_config"] = document["lora_config"]
    steps = [document[key] for key in STEP_KEYS if key in document]
    steps = [s.item() if isinstance(s, Tensor) and s.numel() == 1 else s for s in steps]
    return LegacyCheckpoint(
        tensors=_by_file_keys(_lora_tensors(document), file),
        in_model_order=True,
        step=next((s for s in steps if isinstance(s, int) and not isinstance(s, bool)), None),
        optimizer=optimizer[0] if isinstance(optimizer, list) else optimizer,  # Lightning: a list
        settings=settings,
    )


def _lora_tensors(document: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the LoRA tensors of the first dictionary in the document that has some."""
    for candidate in (*(document.get(key) for key in TENSOR_KEYS), document):
        if isinstance(candidate, Mapping):
            found = {
                key: value.detach().clone()  # a copy, since the file is memory-mapped
                for key, value in candidate.items()
                if isinstance(key, str) and "lora_" in key and isinstance(value, Tensor)
            }
            if found:
                return found
    return {}


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys() if "lora_" in key}  # noqa: SIM118  # safe_open is no mapping
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file}: not a safetensors file: {error}") from None


def _by_file_keys(found: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Renames tensors to PEFT's file keys; returns the adapter `default` if there are several.

    Keys may be those of a live PEFT model, of a wrapper around it (Lightning, DataParallel,
    torch.compile), or of the base model's own modules.
    """
    if not found:
        raise DataError(f"{path}: no LoRA tensors (no key has 'lora_')")
    adapters: dict[str, dict[str, Tensor]] = {}
    for key, tensor in found.items():
        matched = LORA_KEY.fullmatch(key)
        if matched is None or tensor.ndim != 2 or not tensor.is_floating_point():
            raise DataError(f"{path}: {key} is not a matrix of LoRA ('lora_A' or 'lora_B')")
        _, prefix, module = matched["module"].rpartition(KEY_PREFIX)
        if not prefix:
            module = WRAPPER.sub("", module)
            while module.startswith("model.model."):  # a wrapper has an attribute `model`
                module = module.removeprefix("model.")
            module = f"model.{module}" if module.startswith("layers.") else module
        name = (matched["rest"] or "").removesuffix("weight").strip(".") or "default"
        file_key = f"{KEY_PREFIX}{module}.lora_{matched['matrix']}.weight"
        adapters.setdefault(name, {})[file_key] = tensor
    if len(adapters) > 1 and "default" not in adapters:
        names = listing(sorted(adapters))
        raise DataError(f"{path}: several adapters, none of them named 'default': {names}")
    return adapters.get("default") or next(iter(adapters.values()))


@dataclass(frozen=True)
class UsableCheckpoint:
    """A checkpoint that can be converted."""

    path: Path
    step: int
    shapes: Shapes


@dataclass
class CheckpointScan:
    """The outcome of `scan_checkpoints`."""

    usable: list[UsableCheckpoint] = field(default_factory=list)
    """The checkpoints in the order of their steps; all have the same tensors."""
    problems: list[str] = field(default_factory=list)
    """`file: reason` for each checkpoint that cannot be used."""
    final_models: list[Path] = field(default_factory=list)
    """Results such as `models/final.pt`, which belong to no step."""
    settings: RecordedSettings = field(default_factory=dict)
    """Settings of the training that were saved with the weights."""


def scan_checkpoints(run: LegacyRun, max_steps: int | None) -> CheckpointScan:
    """Reads all checkpoints of a run, one at a time, and compares them.

    A single final model is the checkpoint of step `max_steps` if there are no others.
    Raises DataError if no checkpoint can be used.
    """
    scan = CheckpointScan()
    by_step: dict[int, UsableCheckpoint] = {}
    for path in run.checkpoints:
        try:
            _check(path, run, scan, by_step)
        except LoragenError as error:
            scan.problems += error.problems
    if not by_step and len(scan.final_models) == 1 and max_steps:
        path = scan.final_models.pop()
        shapes = shapes_of(read_legacy_checkpoint(path).tensors)
        by_step[max_steps] = UsableCheckpoint(path, max_steps, shapes)
    if not by_step:
        raise DataError(*(scan.problems or map(_no_step, scan.final_models)))
    usual = Counter(tuple(sorted(one.shapes.items())) for _, one in sorted(by_step.items()))
    usual_shapes = dict(usual.most_common(1)[0][0])
    for _, checkpoint in sorted(by_step.items()):
        if problem := shape_mismatch(usual_shapes, checkpoint.shapes):
            scan.problems.append(f"{checkpoint.path}: differs from most checkpoints: {problem}")
        else:
            scan.usable.append(checkpoint)
    return scan


def _check(
    path: Path, run: LegacyRun, scan: CheckpointScan, by_step: dict[int, UsableCheckpoint]
) -> None:
    """Adds a checkpoint to `by_step` or to the final models, and its settings to the scan's."""
    checkpoint = read_legacy_checkpoint(path)
    tensors = checkpoint.tensors
    check_finite(tensors, path)
    scan.settings |= settings_by_synonyms(checkpoint.settings, str(path))
    # `step_080` takes precedence: some loops record a step that counts from 0. `checkpoint-80`
    # comes last: its number may not be a step.
    candidates = (step_in_name(path, explicit=True), checkpoint.step, step_in_name(path))
    step = next((step for step in candidates if step is not None), None)
    if step is None:
        if path != run.directory and not is_final_model(path):
            raise DataError(_no_step(path))
        scan.final_models.append(path)
    elif step < 1:
        raise DataError(
            f"{path}: step {step}: steps are counted from 1, after each optimizer step; "
            "rename it to step_NNN"
        )
    elif step not in by_step:
        by_step[step] = UsableCheckpoint(path, step, shapes_of(tensors))
    else:
        other = by_step[step].path
        same = read_legacy_checkpoint(other).tensors
        if same.keys() != tensors.keys() or not all(same[k].equal(v) for k, v in tensors.items()):
            raise DataError(f"{path}: step {step} again, with other weights than {other}")


def _no_step(path: Path) -> str:
    return f"{path}: no step in the file or in its name; rename it to step_NNN"


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    return {key: value.shape for key, value in tensors.items()}
