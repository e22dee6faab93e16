"""The files of a converted run."""

from collections.abc import Mapping
from pathlib import Path
from shutil import copyfile
from typing import Any

import lightning
import torch
from torch import Tensor

from loragen.core.adapters import Adapter, write_adapter
from loragen.core.config import LoraTrainConfig, dump
from loragen.core.conversion.discover import LegacyRun
from loragen.core.conversion.read import (
    LegacyCheckpoint,
    converted_optimizer,
    read_checkpoint,
    read_optimizer,
)
from loragen.core.conversion.survey import Survey
from loragen.core.files import natural_key, write_text
from loragen.core.manifests import LoraManifest, write_manifest
from loragen.core.plugins import create
from loragen.core.runs import CHECKPOINTS, checkpoint_name

TRACKING = ("batch_tracking_*.jsonl", "checkpoint_mapping_*.json", "line_checkpoint_mapping_*.json")


def write_run(
    directory: Path,
    run: LegacyRun,
    surveyed: Survey,
    config: LoraTrainConfig,
    manifest: LoraManifest,
    order: list[str] | None,
) -> int:
    """Everything of the run; gives how many checkpoints have an optimizer state."""
    (directory / CHECKPOINTS).mkdir(parents=True)
    schedule = create("schedule", config.schedule.name, config.schedule.options)
    states = 0
    tensors: dict[str, Tensor] = {}
    for one in surveyed.checkpoints:
        checkpoint = read_checkpoint(one.entry)
        tensors, certain = _in_order(checkpoint, order)
        optimizer = None
        if certain:
            rate = schedule(one.step + 1, config.training.max_steps).learning_rate
            state = read_optimizer(one.entry, checkpoint.optimizer)
            optimizer = converted_optimizer(state, tensors, rate)
        states += optimizer is not None
        document = lightning_checkpoint(one.step, tensors, optimizer)
        torch.save(document, directory / CHECKPOINTS / checkpoint_name(one.step))
    card = _card(config, manifest)
    write_adapter(directory / "adapter", Adapter(manifest.adapter_config, tensors), card)
    _copy_tracking(run, directory / "tracking")
    write_text(directory / "config.yaml", dump(config))
    write_manifest(directory, manifest)
    return states


def _in_order(
    checkpoint: LegacyCheckpoint, order: list[str] | None
) -> tuple[dict[str, Tensor], bool]:
    """The tensors in the order of the model's modules, and whether that is beyond doubt: the state
    of an optimizer has numbers, no names."""
    own = list(checkpoint.tensors)
    if order is not None:
        certain = not checkpoint.ordered or own == order
        return {key: checkpoint.tensors[key] for key in order}, certain
    keys = own if checkpoint.ordered else sorted(own, key=natural_key)
    return {key: checkpoint.tensors[key] for key in keys}, checkpoint.ordered


def lightning_checkpoint(
    step: int, tensors: Mapping[str, Tensor], optimizer: Any
) -> dict[str, Any]:
    """As our own training would have written it, without what only its loops know."""
    return {
        "epoch": 0,
        "global_step": step,
        "pytorch-lightning_version": lightning.__version__,
        "state_dict": {
            f"model.{key.removesuffix('.weight')}.default.weight": value.contiguous()
            for key, value in tensors.items()
        },
        "loops": {},
        "callbacks": {},
        "optimizer_states": [] if optimizer is None else [optimizer],
        "lr_schedulers": [],
    }


def _copy_tracking(run: LegacyRun, directory: Path) -> None:
    """Byte for byte; they name the checkpoints as they were."""
    for pattern in TRACKING:
        for file in sorted(run.logs.glob(pattern)):
            directory.mkdir(exist_ok=True)
            copyfile(file, directory / file.name)


def _card(config: LoraTrainConfig, manifest: LoraManifest) -> str:
    return (
        f"---\nbase_model: {config.base_model}\nlibrary_name: peft\ntags: [lora, loragen]\n---\n\n"
        f"# {manifest.dataset.name}\n\nA LoRA adapter (rank {config.lora.rank}, step "
        f"{manifest.steps[-1]}), converted by `loragen ckpt convert`.\n"
    )
