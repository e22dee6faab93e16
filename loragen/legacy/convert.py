"""The files of a converted run.

A traditional run -> a run directory that `gen train` and resuming accept; whole, or nothing.
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

from loragen.core.adapter.files import Adapter, peft_config, plain_config, write_adapter
from loragen.core.config import LoraTrainConfig, Override, dump, load
from loragen.core.data.documents import SUFFIXES, content_hash, location
from loragen.core.data.rows import find_dataset, read
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
from loragen.legacy.checkpoints import (
    LegacyCheckpoint,
    converted_optimizer,
    read_foreign_checkpoint,
    read_optimizer,
)
from loragen.legacy.discover import LegacyRun
from loragen.legacy.facts import (
    Fact,
    Facts,
    adapter_facts,
    dataset_in_path,
    facts_beside,
    say_origins,
    yaml_facts,
)
from loragen.legacy.survey import Survey, rank_of, survey, targets_and_order

log = logging.getLogger(__name__)

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
        checkpoint = read_foreign_checkpoint(one.entry)
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


ASSUMED = ("training.batch_size", "data.max_length", "seed")


@dataclass(frozen=True)
class ConversionOptions:
    """What the user says of the runs; whatever is None is looked for beside the checkpoints."""

    output: Path = Path("runs")
    base_model: str | None = None
    dataset: str | None = None
    data_root: Path = Path("data_to_lora/cs")
    alpha: float | None = None
    config: Path | None = None
    skip_bad: bool = False


@dataclass(frozen=True)
class Converted:
    directory: Path
    manifest: LoraManifest
    left_out: list[str]
    """`file: reason`"""
    optimizer_states: int
    """Checkpoints whose optimizer state came along."""
    assumed: list[str]
    """Settings that nothing records: config.yaml has the defaults."""
    already: bool = False
    """It had been converted before; nothing was done."""


def convert(run: LegacyRun, options: ConversionOptions) -> Converted:
    """Raises UsageError saying what to give where something is not recorded, DataError for bad
    checkpoints unless `skip_bad`."""
    facts = _facts(run, options)
    dataset = _dataset(run, facts, options)
    if earlier := _converted_before(run, dataset.name, options.output):
        return Converted(earlier, read_manifest(earlier, LoraManifest), [], 0, [], already=True)
    surveyed = survey(run, _value(facts, "training.max_steps"))
    if surveyed.bad and not options.skip_bad:
        raise DataError(*(f"{line} (--skip-bad leaves it out)" for line in surveyed.bad))
    facts = {**surveyed.facts, **facts}
    config, order = _config(run, facts, surveyed, dataset, options)
    manifest = _manifest(run, config, dataset, surveyed)
    directory = create_run_directory(options.output, f"{dataset.name}_lora", run.started)
    try:
        with written_atomically(directory) as temporary:
            states = write_run(temporary, run, surveyed, config, manifest, order)
    except BaseException:
        with suppress(OSError):
            directory.rmdir()  # it holds nothing yet
        raise
    left_out = [*surveyed.bad, *(f"{entry}: belongs to no step" for entry in surveyed.results)]
    return Converted(directory, manifest, left_out, states, _assumed(facts))


def check_one_dataset(runs: Sequence[LegacyRun], options: ConversionOptions) -> None:
    """Raises UsageError where `--dataset` would stand for runs of several datasets."""
    names = sorted({dataset_in_path(run) or "" for run in runs})
    if options.dataset and len(names) > 1:
        raise UsageError(
            f"--dataset {options.dataset} is one dataset, the runs are of {len(names)}: "
            f"{listing(names)}; convert them apart, or name their folder with --data-root"
        )


def _manifest(
    run: LegacyRun, config: LoraTrainConfig, dataset: DatasetRecord, surveyed: Survey
) -> LoraManifest:
    """None of our plugins took part in the training, so it lists none."""
    return LoraManifest(
        status="success",
        started=(run.started or datetime.now(UTC)).isoformat(timespec="seconds"),
        plugins=[],
        base_model=config.base_model,
        dataset=dataset,
        adapter_config=plain_config(peft_config(config.lora, config.base_model)),
        seed=config.seed,
        max_steps=config.training.max_steps,
        steps=[one.step for one in surveyed.checkpoints],
        converted_from=str(run.source.absolute()),
    )


def _assumed(facts: Facts) -> list[str]:
    schedule = [] if any(name.startswith("schedule.") for name in facts) else ["schedule"]
    return [name for name in ASSUMED if name not in facts] + schedule


def _facts(run: LegacyRun, options: ConversionOptions) -> Facts:
    """flags > --config > adapter_config.json > YAML beside the checkpoints, which --config
    replaces"""
    given = {
        "base_model": Fact(options.base_model, "--base-model"),
        "lora.alpha": Fact(options.alpha, "--alpha"),
    }
    return {
        **({} if options.config else facts_beside(run)),
        **adapter_facts(run),
        **(yaml_facts(options.config) if options.config else {}),
        **{key: fact for key, fact in given.items() if fact.value is not None},
    }


def _value(facts: Facts, name: str, default: Any = None) -> Any:
    return facts[name].value if name in facts else default


def _dataset(run: LegacyRun, facts: Facts, options: ConversionOptions) -> DatasetRecord:
    """Its file as it is today, where it can be found; else the name alone."""
    wanted = options.dataset or dataset_in_path(run) or _value(facts, "data.dataset")
    if not wanted:
        raise UsageError(f"{run.source}: which dataset is it of? Give --dataset NAME|FILE")
    wanted, file = str(wanted), None
    try:
        name, file = find_dataset(wanted, options.data_root)
        rows, digest = len(read(file).rows), content_hash(file)
    except LoragenError as error:
        if options.dataset and (file or Path(wanted).suffix.lower() in SUFFIXES):
            raise
        if file:
            log.warning("dataset %s: %s", wanted, one_line(error))
        return DatasetRecord(name=_plain_name(wanted), path="", sha256="", rows=0)
    return DatasetRecord(name=name, path=location(file), sha256=digest, rows=rows)


def _plain_name(dataset: str) -> str:
    """`data/gsm8k.v2.jsonl` -> gsm8k.v2"""
    path = Path(dataset)
    return path.stem if path.suffix.lower() in SUFFIXES else path.name


def _converted_before(run: LegacyRun, dataset: str, output: Path) -> Path | None:
    source = str(run.source.absolute())
    for file in sorted(output.glob(f"{dataset}_lora_*/{MANIFEST}")):
        with suppress(DataError):  # not a run of ours: not the one we look for
            if read_manifest(file.parent, LoraManifest).converted_from == source:
                return file.parent
    return None


def _config(
    run: LegacyRun,
    facts: Facts,
    surveyed: Survey,
    dataset: DatasetRecord,
    options: ConversionOptions,
) -> tuple[LoraTrainConfig, list[str] | None]:
    """The configuration of the training, as far as it is known, with defaults for the rest; and
    the order of the tensors in the base."""
    _require(run, facts)
    try:
        rank = rank_of(surveyed.shapes)
        targets, order = targets_and_order(facts["base_model"], rank, surveyed.shapes)
    except DataError as error:
        raise DataError(f"{surveyed.checkpoints[-1].entry}: {error}") from None
    steps = [one.step for one in surveyed.checkpoints]
    say_origins(facts, ("base_model", "lora.alpha"))
    known = {
        **{name: value for name, (value, _) in facts.items()},
        "runs_dir": str(options.output),
        "data.root": str(options.data_root),
        "data.dataset": dataset.path or dataset.name,
        "lora.rank": rank,
        "lora.target_modules": targets,
        "training.max_steps": max(steps[-1], _value(facts, "training.max_steps", 0)),
        "checkpoints.first_step": steps[0],
        "checkpoints.every": gcd(*(b - a for a, b in pairwise(steps))) or 1,
    }
    origins = {name: origin for name, (_, origin) in facts.items()}
    flags = [
        Override(tuple(key.split(".")), value, origins.get(key, str(run.source)))
        for key, value in known.items()
    ]
    return load(LoraTrainConfig, flags=flags, environment={}), order


def _require(run: LegacyRun, facts: Facts) -> None:
    if "lora.alpha" not in facts:
        raise UsageError(
            f"{run.source}: alpha is not recorded (no adapter_config.json, no lora_alpha in a "
            "YAML file beside it); give --alpha or --config"
        )
    if "base_model" not in facts:
        raise UsageError(
            f"{run.source}: the base model is not recorded; give --base-model or --config"
        )
