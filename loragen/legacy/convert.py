"""Conversion of a run of the original scripts to a run directory of loragen.

`gen train` learns from the result, `lora eval` and `lora export` read it, `lora train --resume`
continues it. The directory is written atomically; the source is only read.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from math import gcd
from pathlib import Path
from shutil import copyfile
from typing import Any

import lightning
import torch
from torch import Tensor

from loragen.core.adapter.export import front_matter, how_to_load
from loragen.core.adapter.files import Adapter, peft_config, plain_config, write_adapter
from loragen.core.config import LoraTrainConfig, Override, dump, load
from loragen.core.data.dataset import Dataset
from loragen.core.data.documents import SUFFIXES
from loragen.core.errors import DataError, LoragenError, UsageError, listing, one_line
from loragen.core.files import natural_key, write_text, written_atomically
from loragen.core.plugins import create
from loragen.core.run.directory import (
    CHECKPOINTS,
    MANIFEST,
    DatasetRecord,
    LoraManifest,
    checkpoint_name,
    create_run_directory,
    read_manifest,
    write_manifest,
)
from loragen.legacy.adapters import InferredLora, flag_settings, infer_lora
from loragen.legacy.checkpoints import CheckpointScan, read_legacy_checkpoint, scan_checkpoints
from loragen.legacy.experiments import (
    LegacyRun,
    RecordedSettings,
    settings_beside,
    settings_in_adapter_config,
    settings_in_yaml,
)

log = logging.getLogger(__name__)

TRACKING_FILES = (
    "batch_tracking_*.jsonl", "checkpoint_mapping_*.json", "line_checkpoint_mapping_*.json",
)  # fmt: skip
MOMENTS = {"step", "exp_avg", "exp_avg_sq"}
"""The state of a parameter in AdamW."""


@dataclass(frozen=True)
class ConversionOptions:
    """The user's settings of the runs; None is read from files beside the checkpoints."""

    output: Path = Path("runs")
    base_model: str | None = None
    dataset: str | None = None
    data_root: Path = Path("data_to_lora/cs")
    alpha: float | None = None
    config: Path | None = None
    skip_bad: bool = False


@dataclass(frozen=True)
class ConversionResult:
    """The outcome of `convert`."""

    directory: Path
    manifest: LoraManifest
    left_out: list[str]
    """`file: reason`"""
    optimizer_states: int
    """Number of checkpoints whose optimizer state was converted."""
    assumed: list[str]
    """Settings that are recorded nowhere; config.yaml has the defaults."""
    already: bool = False
    """The run was converted before; nothing was done."""


def check_one_dataset(runs: Sequence[LegacyRun], options: ConversionOptions) -> None:
    """Raises UsageError if `--dataset` would apply to runs of several datasets."""
    names = sorted({run.dataset_name or "" for run in runs})
    if options.dataset and len(names) > 1:
        raise UsageError(
            f"--dataset {options.dataset}: the runs are of {len(names)} datasets, "
            f"{listing(names)}; convert them separately, or name their folder with --data-root"
        )


def convert(run: LegacyRun, options: ConversionOptions) -> ConversionResult:
    """Converts one run.

    Settings come from flags, then `--config`, adapter_config.json, the YAML files beside the
    checkpoints (unless `--config` is given), and what was saved with the weights.
    Raises UsageError naming the flag for a setting that is not recorded, and DataError for bad
    checkpoints unless `skip_bad`.
    """
    settings = {
        **({} if options.config else settings_beside(run)),
        **settings_in_adapter_config(run),
        **(settings_in_yaml(options.config) if options.config else {}),
        **flag_settings(options.base_model, options.alpha),
    }
    dataset = _dataset_record(run, settings, options)
    for file in sorted(options.output.glob(f"{dataset.name}_lora_*/{MANIFEST}")):
        with suppress(DataError):  # the manifest may be of another kind
            earlier = read_manifest(file.parent, LoraManifest)
            if earlier.converted_from == str(run.source.absolute()):
                return ConversionResult(file.parent, earlier, [], 0, [], already=True)

    max_steps = settings["training.max_steps"].value if "training.max_steps" in settings else None
    scan = scan_checkpoints(run, max_steps)
    if scan.problems and not options.skip_bad:
        raise DataError(*(f"{problem} (--skip-bad leaves it out)" for problem in scan.problems))
    settings = {**scan.settings, **settings}
    last = scan.usable[-1]
    lora = infer_lora(settings, last.shapes, last.path)
    config = _train_config(run, settings, scan, lora, dataset, options)
    manifest = LoraManifest(
        status="success",
        started=(run.started or datetime.now(UTC)).isoformat(timespec="seconds"),
        plugins=[],  # no plugin of loragen took part in the training
        base_model=config.base_model,
        dataset=dataset,
        adapter_config=plain_config(peft_config(config.lora, config.base_model)),
        seed=config.seed,
        max_steps=config.training.max_steps,
        steps=[checkpoint.step for checkpoint in scan.usable],
        converted_from=str(run.source.absolute()),
    )
    directory = create_run_directory(options.output, f"{dataset.name}_lora", run.started)
    try:
        with written_atomically(directory) as temporary:
            num_states = _write_run(temporary, run, scan, config, manifest, lora.order)
    except BaseException:
        with suppress(OSError):
            directory.rmdir()  # it is still empty
        raise
    assumed = [
        name for name in ("training.batch_size", "data.max_length", "seed") if name not in settings
    ]
    if not any(name.startswith("schedule.") for name in settings):
        assumed.append("schedule")
    left_out = [*scan.problems, *(f"{path}: belongs to no step" for path in scan.final_models)]
    return ConversionResult(directory, manifest, left_out, num_states, assumed)


def _dataset_record(
    run: LegacyRun, settings: RecordedSettings, options: ConversionOptions
) -> DatasetRecord:
    """Describes the dataset's file if it can be found; otherwise records the name alone."""
    recorded = settings["data.dataset"].value if "data.dataset" in settings else None
    wanted = options.dataset or run.dataset_name or recorded
    if not wanted:
        raise UsageError(f"{run.source}: the dataset is not recorded; give --dataset NAME|FILE")
    path, dataset = Path(str(wanted)), None
    is_file_name = path.suffix.lower() in SUFFIXES
    try:
        dataset = Dataset.find(str(wanted), options.data_root)
        return DatasetRecord(
            name=dataset.name,
            path=dataset.location,
            sha256=dataset.sha256,
            rows=len(dataset.good_rows),
        )
    except LoragenError as error:
        if options.dataset and (dataset or is_file_name):
            raise
        if dataset:
            log.warning("dataset %s: %s", wanted, one_line(error))
    name = path.stem if is_file_name else path.name  # data/gsm8k.v2.jsonl -> gsm8k.v2
    return DatasetRecord(name=name, path="", sha256="", rows=0)


def _train_config(
    run: LegacyRun,
    settings: RecordedSettings,
    scan: CheckpointScan,
    lora: InferredLora,
    dataset: DatasetRecord,
    options: ConversionOptions,
) -> LoraTrainConfig:
    """Returns the training's configuration from recorded and inferred settings and defaults."""
    steps = [checkpoint.step for checkpoint in scan.usable]
    values = {key: value for key, (value, _) in settings.items()}
    inferred = {
        "runs_dir": str(options.output),
        "data.root": str(options.data_root),
        "data.dataset": dataset.path or dataset.name,
        "lora.rank": lora.rank,
        "lora.target_modules": lora.target_modules,
        "training.max_steps": max(steps[-1], values.get("training.max_steps", 0)),
        "checkpoints.first_step": steps[0],
        "checkpoints.every": gcd(*(later - step for step, later in pairwise(steps))) or 1,
    }
    origins = {key: origin for key, (_, origin) in settings.items()}
    overrides = [
        Override(tuple(key.split(".")), value, origins.get(key, str(run.source)))
        for key, value in {**values, **inferred}.items()
    ]
    return load(LoraTrainConfig, flags=overrides, environment={})


def _write_run(
    directory: Path,
    run: LegacyRun,
    scan: CheckpointScan,
    config: LoraTrainConfig,
    manifest: LoraManifest,
    order: list[str] | None,
) -> int:
    """Writes the run directory; returns the number of checkpoints with an optimizer state.

    `order` is that of the base's modules, if it is known. The state of an optimizer has numbers
    instead of names; it is converted only if the order of the parameters is certain.
    """
    (directory / CHECKPOINTS).mkdir(parents=True)
    schedule = create("schedule", config.schedule.name, config.schedule.options)
    num_states = 0
    tensors: dict[str, Tensor] = {}
    for usable in scan.usable:
        checkpoint = read_legacy_checkpoint(usable.path)
        keys = list(checkpoint.tensors)
        if order is not None:
            certain = not checkpoint.in_model_order or keys == order
        else:
            certain = checkpoint.in_model_order
            keys = keys if certain else sorted(keys, key=natural_key)
        tensors = {key: checkpoint.tensors[key] for key in order or keys}
        optimizer = None
        if certain:
            rate = schedule(usable.step + 1, config.training.max_steps).learning_rate
            optimizer = convert_optimizer(checkpoint.optimizer, tensors, rate)
        num_states += optimizer is not None
        document = {  # in Lightning's format, with loops that have not started
            "epoch": 0,
            "global_step": usable.step,
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
        torch.save(document, directory / CHECKPOINTS / checkpoint_name(usable.step))
    card = (
        f"{front_matter(config.base_model)}\n# {manifest.dataset.name}\n\n"
        f"A LoRA adapter (rank {config.lora.rank}, step {manifest.steps[-1]}), converted by "
        f"`loragen ckpt convert`.\n\n"
        f"{how_to_load(config.base_model)}"
    )
    lineage = manifest.lineage(manifest.steps[-1], directory.name)
    adapter = Adapter(manifest.adapter_config, tensors, lineage=lineage)
    write_adapter(directory / "adapter", adapter, card)
    for pattern in TRACKING_FILES:  # copied unchanged, although they name the original checkpoints
        for file in sorted(run.logs.glob(pattern)):
            (directory / "tracking").mkdir(exist_ok=True)
            copyfile(file, directory / "tracking" / file.name)
    write_text(directory / "config.yaml", dump(config))
    write_manifest(directory, manifest)
    return num_states


def convert_optimizer(state: Any, tensors: Mapping[str, Tensor], learning_rate: float) -> Any:
    """Converts the state dict of a torch AdamW over exactly these tensors, in their order.

    `learning_rate` is that of the next step. Frozen parameters, which have no moments, may be
    among its parameters. Returns None for anything else, such as Adam with an L2 penalty.
    """
    try:
        moments, groups = state["state"], state["param_groups"]
        trained = [group for group in groups if any(p in moments for p in group["params"])]
        (group,) = trained
        states = [moments[p] for p in group["params"] if p in moments]
    except (TypeError, KeyError, ValueError):
        return None
    if group.get("weight_decay") and not group.get("decoupled_weight_decay", True):
        return None
    if len(states) != len(tensors) or not all(map(_fits, states, tensors.values())):
        return None
    options = {key: group[key] for key in ("betas", "eps", "weight_decay") if key in group}
    try:
        # The optimizer is that of loragen: the schedule multiplies a learning rate of 1.
        parameters = [torch.zeros_like(tensor) for tensor in tensors.values()]
        document = torch.optim.AdamW(parameters, lr=1.0, fused=True, **options).state_dict()
    except (TypeError, ValueError):
        return None
    document["param_groups"][0] |= {"lr": learning_rate, "initial_lr": 1.0}
    document["state"] = {
        index: {
            "step": torch.tensor(float(one["step"])),
            "exp_avg": one["exp_avg"].clone(),
            "exp_avg_sq": one["exp_avg_sq"].clone(),
        }
        for index, one in enumerate(states)
    }
    return document


def _fits(state: Any, tensor: Tensor) -> bool:
    if not isinstance(state, Mapping) or set(state) != MOMENTS:
        return False
    return all(
        isinstance(moment, Tensor)
        and moment.shape == tensor.shape
        and bool(torch.isfinite(moment).all())
        for moment in (state["exp_avg"], state["exp_avg_sq"])
    )
