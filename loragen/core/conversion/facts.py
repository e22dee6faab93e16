"""What is known of a traditional training besides its weights, and from where."""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from math import sqrt
from pathlib import Path
from typing import Any

from loragen.core.config.yaml_file import read_yaml
from loragen.core.conversion.discover import LegacyRun
from loragen.core.errors import ConfigError, DataError
from loragen.core.runs import ADAPTER_CONFIG

log = logging.getLogger(__name__)

# Our setting -> what traditional configurations call it (dotted, lower case).
TRAINING = r"(?:training\.|train\.|schedule\.)?"
NAMES = {
    "base_model": r"(?:.*\.)?(?:base_model(?:_name)?(?:_or_path)?|model_name|model_path"
    r"|(?:pretrained_)?model_name_or_path)|model(?:\.name|\.path)?",
    "data.dataset": r"(?:data\.)?dataset(?:_name|\.name)?",
    "data.max_length": r"(?:training\.|data\.|model\.)?max_(?:seq_)?length",
    "lora.alpha": r"(?:.*\.)?(?:lora_alpha|lora(?:_config)?\.alpha)",
    "lora.dropout": r"(?:.*\.)?(?:lora_dropout|lora(?:_config)?\.dropout)",
    "training.batch_size": TRAINING + r"(?:per_device_train_batch_size|(?:train_)?batch_size)",
    "training.max_steps": TRAINING + r"max_steps",
    "training.weight_decay": r"(?:training\.|optimizer\.)?weight_decay",
    "schedule.stage1_steps": TRAINING + r"stage1[._]steps",
    "schedule.learning_rate_stage1": TRAINING
    + r"(?:stage1[._](?:learning_rate|lr)|learning_rate_stage1)",
    "schedule.learning_rate_stage2": TRAINING
    + r"(?:stage2[._](?:learning_rate|lr)|learning_rate_stage2)",
    "seed": TRAINING + r"seed",
}
TEXTS = ("base_model", "data.dataset")
ACCUMULATION = re.compile(TRAINING + r"(?:gradient_accumulation_steps|accumulate_grad_batches)")
# Fields of an adapter's configuration that change what its tensors mean; ours has none of them.
UNKNOWN = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication")

Facts = dict[str, Any]
"""Our dotted setting -> value."""


def facts_beside(run: LegacyRun) -> Facts:
    """Of the YAML files in the run's directory; one that does not parse is left out."""
    facts: Facts = {}
    for folder in dict.fromkeys((run.directory, run.logs)):
        for file in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]):
            try:
                facts = {**facts_of(read_yaml(file)[0]), **facts}
            except ConfigError as error:
                log.warning("%s; left out", error)
    return facts


def facts_of(tree: Mapping[str, Any]) -> Facts:
    """What a configuration of any shape says, by our names."""
    flat = dict(_flat(tree, ""))
    facts: Facts = {}
    for ours, theirs in NAMES.items():
        for key, value in flat.items():
            if value is not None and re.fullmatch(theirs, key):
                facts.setdefault(ours, value if ours in TEXTS else _number(value))
    for key, value in flat.items():
        if (
            ACCUMULATION.fullmatch(key)
            and isinstance(value, int)
            and "training.batch_size" in facts
        ):
            facts["training.batch_size"] *= value  # ours counts the rows of a whole step
    if not isinstance(facts.get("training.max_steps"), int) or facts["training.max_steps"] < 1:
        facts.pop("training.max_steps", None)  # the Trainer says -1 for none
    return facts


def adapter_facts(run: LegacyRun) -> Facts:
    """Of the adapter_config.json in a checkpoint or beside them; the last checkpoint's first.

    Raises DataError where it describes more than plain LoRA.
    """
    folders = [entry if entry.is_dir() else entry.parent for entry in reversed(run.entries)]
    for folder in dict.fromkeys([*folders, run.directory]):
        if (folder / ADAPTER_CONFIG).is_file():
            return _adapter_facts(folder / ADAPTER_CONFIG)
    return {}


def _adapter_facts(file: Path) -> Facts:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        alpha, rank = float(config["lora_alpha"]), int(config["r"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: not the configuration of a LoRA adapter: {error!r}") from None
    unknown = [name for name in UNKNOWN if config.get(name)]
    if config.get("bias", "none") != "none":
        unknown.append("bias")
    if unknown:
        raise DataError(f"{file}: {', '.join(unknown)}: only plain LoRA can be converted")
    if config.get("use_rslora"):
        alpha *= sqrt(rank)  # alpha / sqrt(r), said as alpha / r
    facts = {
        "lora.alpha": alpha,
        "lora.dropout": config.get("lora_dropout", 0.0),
        "base_model": config.get("base_model_name_or_path"),
    }
    return {key: value for key, value in facts.items() if value is not None}


def dataset_in_path(run: LegacyRun) -> str | None:
    """From the tracking logs' names, else the folder around a traditional run."""
    for file in sorted(run.logs.glob("batch_tracking_*.jsonl")):
        return file.stem.removeprefix("batch_tracking_")
    name = run.directory.absolute().parent.name
    return name if run.traditional and name not in {"", "experiments", "runs"} else None


def _flat(tree: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        path = f"{prefix}{key}".lower()
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}.")
        else:
            yield path, value


def _number(value: Any) -> Any:
    """YAML 1.1 reads `1e-4` as text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
