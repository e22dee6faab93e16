"""What is known of a traditional training besides its weights, and from where."""

import json
import logging
import re
from collections.abc import Iterable, Mapping
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

from loragen.core.adapter import CONFIG_FILE
from loragen.core.config.load import origin_of
from loragen.core.config.yaml_file import Loc, dotted, paths, read_yaml
from loragen.core.errors import ConfigError, DataError
from loragen.legacy.discover import LegacyRun
from loragen.legacy.translate import translated

log = logging.getLogger(__name__)

# Our setting -> what loops of people's own call it (dotted, lower case): for what was saved with
# the weights, and for YAML that is in no form the scripts had; for those, config.legacy.
TRAINING = r"(?:training\.|train\.|schedule\.)?"
LORA = r"(?:(?:model\.)?(?:lora|peft|adapter)(?:_config)?\.)?"
NAMES = {
    "base_model": r"(?:model\.|lora_config\.)?(?:base_model(?:_name)?(?:_or_path)?|model_name"
    r"|model_path|(?:pretrained_)?model_name_or_path)|model(?:\.name|\.path)?",
    "data.dataset": r"(?:data\.)?dataset(?:_name|\.name)?",
    "data.max_length": r"(?:training\.|data\.|model\.)?max_(?:seq_)?length",
    "lora.alpha": LORA + r"lora_alpha|(?:model\.)?lora(?:_config)?\.alpha",
    "lora.dropout": LORA + r"lora_dropout|(?:model\.)?lora(?:_config)?\.dropout",
    "training.batch_size": TRAINING + r"(?:per_device_train_batch_size|(?:train_)?batch_size)",
    "training.max_steps": TRAINING + r"max_steps",
    "training.weight_decay": r"(?:training\.|optimizer\.)?weight_decay",
    "schedule.stage1_steps": TRAINING + r"stage1[._]steps",
    "schedule.learning_rate_stage1": TRAINING
    + r"(?:stage1[._](?:learning_rate|lr)|learning_rate_stage1)",
    "schedule.learning_rate_stage2": TRAINING
    + r"(?:stage2[._](?:learning_rate|lr)|learning_rate_stage2)",
    "trainer.gradient_clip_val": r"(?:training\.|train\.|trainer\.)?"
    r"(?:max_grad_norm|gradient_clip_val)",
    "seed": TRAINING + r"seed",
}
# Of a configuration in today's words: the rest is another machine's, or follows from the files.
KEPT = re.compile(
    r"base_model|seed|data\.(?:dataset|max_length)|lora\.(?:alpha|dropout)|(?:training|schedule)\..+"
    r"|trainer\.(?:precision|gradient_clip_val|accumulate_grad_batches)"
)
TEXTS = ("base_model", "data.dataset")
ACCUMULATION = re.compile(TRAINING + r"(?:gradient_accumulation_steps|accumulate_grad_batches)")
# Fields of an adapter's configuration that change what its tensors mean; ours has none of them.
UNKNOWN = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication")


class Fact(NamedTuple):
    value: Any
    origin: str
    """Where it is said: a place in a file, or a flag."""


Facts = dict[str, Fact]
"""By our dotted settings."""


def facts_beside(run: LegacyRun) -> Facts:
    """Of the YAML files in the run's directory; one that does not parse is left out. Those in the
    form of the scripts count most. Beside a lone file there may be anything: none is read.

    Raises ConfigError as `yaml_facts`.
    """
    if run.lone:
        return {}
    old: Facts = {}
    others: Facts = {}
    for folder in dict.fromkeys((run.directory, run.logs)):
        for file in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]):
            try:
                tree, origins = read_yaml(file)
            except ConfigError as error:
                log.warning("%s; left out", error)
                continue
            found = _translated_facts(tree, origins)
            if found is None:
                others = {**facts_of(tree, str(file), origins), **others}
            else:
                old = {**found, **old}
    return {**others, **old}


def yaml_facts(file: Path) -> Facts:
    """Of a configuration of any shape, by our names.

    Raises ConfigError for one of the scripts before loragen that says what today's cannot.
    """
    tree, origins = read_yaml(file)
    found = _translated_facts(tree, origins)
    return facts_of(tree, str(file), origins) if found is None else found


def _translated_facts(tree: Mapping[str, Any], origins: Mapping[Loc, str]) -> Facts | None:
    """None for a file that is not in one of the old forms."""
    old = translated(tree, origins, "lora")
    if old is None:
        return None
    if old.problems:
        raise ConfigError(*old.problems)
    facts: Facts = {}
    for keys in paths(old.tree):
        value = _at(old.tree, keys)
        if KEPT.fullmatch(dotted(keys)) and value is not None and not isinstance(value, dict):
            facts[dotted(keys)] = Fact(value, old.place(keys).removesuffix(": "))
    return _without_open_end(facts)


def facts_of(
    tree: Mapping[str, Any], origin: str, origins: Mapping[Loc, str] | None = None
) -> Facts:
    """What settings of any shape say, by our names; `origins` are the places of the keys."""
    flat = {
        dotted(keys).lower(): Fact(value, origin_of(keys, origins or {}) or origin)
        for keys in paths(tree)
        if not isinstance(value := _at(tree, keys), Mapping)
    }
    facts: Facts = {}
    for ours, theirs in NAMES.items():
        for key, (value, place) in flat.items():
            if value is not None and re.fullmatch(theirs, key):
                facts.setdefault(ours, Fact(value if ours in TEXTS else _number(value), place))
    batch = facts.get("training.batch_size")
    for key, (value, _) in flat.items():
        if batch and ACCUMULATION.fullmatch(key) and isinstance(value, int):
            # Ours counts the rows of a whole step.
            facts["training.batch_size"] = batch._replace(value=batch.value * value)
    return _without_open_end(facts)


def _without_open_end(facts: Facts) -> Facts:
    """The Trainer says -1 for no `max_steps`."""
    steps = facts.get("training.max_steps")
    if steps and (not isinstance(steps.value, int) or steps.value < 1):
        del facts["training.max_steps"]
    return facts


def adapter_facts(run: LegacyRun) -> Facts:
    """Of the adapter_config.json in a checkpoint or beside them; the last checkpoint's first.

    Raises DataError where it describes more than plain LoRA.
    """
    folders = [entry if entry.is_dir() else entry.parent for entry in reversed(run.entries)]
    for folder in dict.fromkeys([*folders, run.directory]):
        if (folder / CONFIG_FILE).is_file():
            return _adapter_facts(folder / CONFIG_FILE)
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
    return {key: Fact(value, str(file)) for key, value in facts.items() if value is not None}


def say_origins(facts: Facts, names: Iterable[str]) -> None:
    """Tells which files the named settings are from."""
    for name in names:
        value, origin = facts[name]
        if not origin.startswith("--"):
            log.info("%s %s is from %s", name, value, origin)


def dataset_in_path(run: LegacyRun) -> str | None:
    """From the tracking logs' names, else the folder around a traditional run."""
    for file in sorted(run.logs.glob("batch_tracking_*.jsonl")):
        return file.stem.removeprefix("batch_tracking_")
    name = run.directory.absolute().parent.name
    return name if run.traditional and name not in {"", "experiments", "runs"} else None


def _at(tree: Any, keys: Loc) -> Any:
    for key in keys:
        tree = tree[key]
    return tree


def _number(value: Any) -> Any:
    """YAML 1.1 reads `1e-4` as text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
