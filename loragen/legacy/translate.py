"""Configuration files of the original scripts, translated to current keys and values.

`read_legacy_config` serves `--config FILE`, `migrate_config` serves `loragen config migrate`. Every
value keeps its position in the file, so that an error of the schema names the line the user wrote.
"""

import logging
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from pydantic import BaseModel, NonNegativeInt, TypeAdapter, ValidationError

from loragen.core.config.keys import has_key
from loragen.core.config.load import Layers, origin_of, validate_layers
from loragen.core.config.schema import MODELS, command_of
from loragen.core.config.yaml_file import Loc, commented, dotted, inline, paths, read_yaml
from loragen.core.contents import read_bytes, utf8_text
from loragen.core.errors import ConfigError, did_you_mean, listing
from loragen.legacy.formats import (
    ABSENT,
    ANY_VALUE,
    CONVERSION_REASONS,
    CONVERTERS,
    FORMATS,
    STAGE2_STEPS,
    LegacyFormat,
)

log = logging.getLogger(__name__)

COMMON_KEYS = {
    "seed", "trainer", "lora", "lora.dropout", "lora.target_modules",
    "training", "training.batch_size", "training.max_steps", "training.max_epochs",
    "training.learning_rate", "training.weight_decay", "training.mse_weight", "training.l1_weight",
    "data", "data.dataset", "data.max_length", "data.val_ratio", "data.checkpoint_dir",
    "data.batch_size", "data.samples_per_prompt", "data.max_checkpoints", "data.cache_tokenized",
}  # fmt: skip
"""Keys that the old and the current formats share, besides all of `trainer`."""
DEFAULT_BATCH_SIZE = 32
"""Rows; the default of the original scripts."""
DEFAULT_STAGE1_STEPS = 75
COUNT = TypeAdapter(NonNegativeInt)


@dataclass(frozen=True)
class KeyChange:
    """The change of one old key."""

    old: str
    new: str | None
    """None for a key that was removed."""
    note: str = ""
    """Why the value changed; empty if only the key was renamed."""
    lossless: bool = False
    """The meaning is kept: mentioned in a migrated file, but not in a warning."""

    def __str__(self) -> str:
        if self.new is None:
            return f"{self.old} was removed; {self.note}"
        return f"was {self.old}{': ' if self.note else ''}{self.note}"


@dataclass
class Translation:
    """The settings of an old file under their current keys, and what changed on the way."""

    format: LegacyFormat
    tree: dict[str, Any]
    origins: dict[Loc, str]
    """The origin of each value: `file:line:column`, with the old key if it has another name."""
    problems: list[str] = field(default_factory=list)
    changes: list[KeyChange] = field(default_factory=list)
    command_option: str = ""
    """The option that `config migrate` needs if the keys alone suggest another command."""

    def summary(self, file: Path) -> str:
        """Returns one line with the format of the file and the values that changed."""
        changes = [change for change in self.changes if change.note and not change.lossless]
        head = (
            f"{file} is in the {self.format.name} format of the original scripts; "
            f"`loragen config migrate {file}{self.command_option}` prints it in the current format"
        )
        return "; ".join([head, *(f"{change.new or ''} {change}".lstrip() for change in changes)])

    def position(self, keys: Loc) -> str:
        """Returns `file:line:column` of a key, or of the nearest section around it."""
        return origin_of(keys, self.origins) or ""

    def old_key(self, new: str) -> str | None:
        return next((change.old for change in self.changes if change.new == new), None)

    def get(self, path: str, default: Any = ABSENT) -> Any:
        return _get(self.tree, _keys(path), default)

    def put(self, path: str, value: Any, origin: str) -> None:
        *parents, last = path.split(".")
        section = self.tree
        for key in parents:
            if not isinstance(section.get(key), dict):
                section[key] = {}
            section = section[key]
        section[last] = value
        self.origins[_keys(path)] = origin

    def remove(self, path: str) -> None:
        """Removes a key, and the sections around it that are empty then."""
        keys = _keys(path)
        while keys:
            section = _get(self.tree, keys[:-1])
            del section[keys[-1]]
            if section:
                return
            keys = keys[:-1]

    def reject(self, path: str, problem: str) -> None:
        self.problems.append(f"{self.position(_keys(path))}: {path}: {problem}")


def read_legacy_config(file: Path, model: type[BaseModel]) -> Layers | None:
    """Reads a file of the original scripts, and logs one warning; None for any other file.

    Raises ConfigError for a file of the original scripts that belongs to another command.
    """
    tree, origins = read_yaml(file)
    command = command_of(model)
    others = [fmt for fmt in FORMATS if fmt.command != command]
    other = max(others, key=lambda fmt: _num_distinctive(tree, fmt))
    own = [_num_distinctive(tree, fmt) for fmt in FORMATS if fmt.command == command]
    if _num_distinctive(tree, other) > max(1, *own):  # a single key may be a mistake
        raise ConfigError(
            f"{file}: this is a file in the {other.name} format; it configures "
            f"`loragen {other.command} train`, not `loragen {command} train`"
        )
    translation = translate(tree, origins, command)
    if translation is None:
        return None
    log.warning("%s", translation.summary(file))
    return Layers(translation.tree, translation.origins, translation.problems)


def command_of_legacy_config(file: Path) -> str | None:
    """Returns the command that a file of the original scripts configures; None for other files."""
    detected = detect_format(read_yaml(file)[0])
    return detected.command if detected else None


def detect_format(tree: Mapping[str, Any], command: str | None = None) -> LegacyFormat | None:
    """Returns the format, of `command` if that is given, that knows most keys of the file.

    None for a file without a distinctive key.
    """
    path_keys = [tuple(map(str, keys)) for keys in paths(tree) if keys]

    def num_known(fmt: LegacyFormat) -> int:
        old = {*fmt.distinctive_keys, *fmt.renamed, *fmt.removed}
        model = MODELS[fmt.command]
        return sum(dotted(keys) in old or has_key(model, keys) for keys in path_keys)

    candidates = [
        fmt for fmt in FORMATS if command in (None, fmt.command) and _num_distinctive(tree, fmt)
    ]
    return max(candidates, key=num_known, default=None)


def translate(
    tree: Mapping[str, Any], origins: Mapping[Loc, str], command: str | None = None
) -> Translation | None:
    """Translates a file of the original scripts; returns None for any other file.

    `command` is the command whose configuration is wanted, if that is known. In a file that is
    mostly current, only distinctive old keys are translated; the schema judges the others.
    """
    old_format = detect_format(tree, command)
    if old_format is None:
        return None
    translation = Translation(old_format, deepcopy(dict(tree)), dict(origins))
    if (detect_format(tree) or old_format).command != old_format.command:
        translation.command_option = f" --command {old_format.command}"
    mostly_current = _is_mostly_current(tree, old_format)

    def applies(old: str) -> bool:
        if has_key(MODELS[old_format.command], _keys(old)):
            return False
        distinctive = old_format.distinctive_keys
        return not mostly_current or any(f"{old}.".startswith(f"{key}.") for key in distinctive)

    old_keys = [key for key in (*old_format.renamed, *old_format.removed) if applies(key)]
    for old in old_keys:
        value = translation.get(old)
        if value is ABSENT:
            continue
        if old in old_format.removed:
            _remove_key(translation, old, value)
        elif not (isinstance(value, dict) and any(k.startswith(f"{old}.") for k in old_keys)):
            _rename_key(translation, old, value)  # `model: NAME`, but not `model: {name: NAME}`
    if old_format.command == "lora":
        old_keys += STAGE2_STEPS
        for old in STAGE2_STEPS:
            if translation.get(old) is not ABSENT:
                _check_stage2_steps(translation, old)
        _keep_stage2_checkpoints(translation)
        if not mostly_current or translation.old_key("training.batch_size"):
            _multiply_batch_size(translation)
    loggers = translation.get("loggers")
    if isinstance(loggers, dict) and any(
        translation.old_key(f"loggers.{name}") for name in ("tensorboard", "swanlab")
    ):  # the scripts had both by default; a current file has only those it names
        both = {"tensorboard": {}, "swanlab": {}, **loggers}
        translation.tree["loggers"] = {k: v for k, v in both.items() if v is not False}
    _reject_unknown_keys(translation, old_keys)
    return translation


def _num_distinctive(tree: Mapping[str, Any], fmt: LegacyFormat) -> int:
    return sum(_get(tree, _keys(key)) is not ABSENT for key in fmt.distinctive_keys)


def _is_mostly_current(tree: Mapping[str, Any], fmt: LegacyFormat) -> bool:
    """Returns whether this is a current file with an old key in it, rather than the reverse."""
    path_keys = [keys for keys in paths(tree) if keys]
    old = {*fmt.renamed, *fmt.removed, *STAGE2_STEPS} & set(map(dotted, path_keys))
    current = [
        keys
        for keys in path_keys
        if has_key(MODELS[fmt.command], keys)
        and dotted(keys) not in COMMON_KEYS
        and keys[0] != "trainer"
    ]
    return any(len(keys) == 1 for keys in current) or len(current) >= max(1, len(old))


def _rename_key(translation: Translation, old: str, given: Any) -> None:
    new = translation.format.renamed[old]
    value = CONVERTERS[old](given) if old in CONVERTERS else given
    position = translation.position(_keys(old))
    translation.remove(old)
    if value is ABSENT:
        return
    occupied = _occupied(translation.tree, _keys(new))
    if occupied:
        problem = f"{position}: {old}: {dotted(occupied)} is given too"
        translation.problems.append(f"{problem}, at {translation.position(occupied)}; keep one")
        return
    below = [keys for keys in translation.origins if keys[: len(_keys(old))] == _keys(old)]
    for keys in below:
        moved = (*_keys(new), *keys[len(_keys(old)) :])
        translation.origins[moved] = f"{translation.origins.pop(keys)} ({dotted(keys)})"
    translation.put(new, value, f"{position} ({old})")
    note = ""
    if value != given:
        note = ", ".join(filter(None, [inline(given), CONVERSION_REASONS.get(old)]))
    translation.changes.append(KeyChange(old, new, note))


def _occupied(tree: dict[str, Any], keys: Loc) -> Loc | None:
    """Returns what prevents a value at `keys`: a value there, or a plain one for a section."""
    for length in range(1, len(keys)):
        section = _get(tree, keys[:length])
        if section is not ABSENT and section is not None and not isinstance(section, dict):
            return keys[:length]
    return None if _get(tree, keys) is ABSENT else keys


def _remove_key(translation: Translation, old: str, value: Any) -> None:
    rule = translation.format.removed[old]
    if ANY_VALUE in rule.ignored_values or value in rule.ignored_values:
        lossless = ANY_VALUE not in rule.ignored_values
        change = KeyChange(f"{old}: {inline(value)}", None, rule.reason, lossless)
        translation.changes.append(change)
    else:
        translation.reject(old, f"{inline(value)} is not supported; {rule.reason}")
    translation.remove(old)


def _check_stage2_steps(translation: Translation, old: str) -> None:
    """Replaces the old key: stage 2 has the steps of `training.max_steps` after stage 1."""
    given, total = translation.get(old), translation.get("training.max_steps")
    stage1 = _count(translation.get("schedule.stage1_steps", DEFAULT_STAGE1_STEPS))
    stage2 = _count(given)
    max_steps = _count(total)
    if stage2 is None:
        translation.reject(old, f"{given!r} is no count; give a number of steps")
    elif stage1 is None or (total is not ABSENT and max_steps is None):
        pass  # the schema rejects the value
    elif max_steps is None:
        origin = f"{translation.position(_keys(old))} ({old})"
        translation.put("training.max_steps", stage1 + stage2, origin)
        note = f"{given}, and {stage1} of stage 1"
        translation.changes.append(KeyChange(old, "training.max_steps", note))
    elif stage2 != max_steps - stage1:
        translation.reject(
            old,
            f"{stage2} steps contradict training.max_steps; {max_steps} steps with {stage1} of "
            f"stage 1 leave {max_steps - stage1}",
        )
    else:
        note = "stage 2 has the remaining steps of training.max_steps"
        translation.changes.append(KeyChange(f"{old}: {given}", None, note, lossless=True))
    translation.remove(old)


def _keep_stage2_checkpoints(translation: Translation) -> None:
    """Sets `checkpoints.first_step`: the scripts kept the checkpoints of stage 2."""
    stage1 = _count(translation.get("schedule.stage1_steps"))
    old = translation.old_key("schedule.stage1_steps")
    if old is None or stage1 is None or stage1 == DEFAULT_STAGE1_STEPS:
        return
    if translation.get("checkpoints.first_step") is ABSENT:
        origin = translation.origins[_keys("schedule.stage1_steps")]
        translation.put("checkpoints.first_step", stage1 + 1, origin)
        note = f"{stage1}, and the steps of stage 2 were kept"
        translation.changes.append(KeyChange(old, "checkpoints.first_step", note))


def _multiply_batch_size(translation: Translation) -> None:
    """Multiplies the batch size, which was one device's micro-batch, by devices and accumulation.

    A current batch size counts the rows of a whole optimizer step.
    """
    key = "training.batch_size"
    given = translation.get(key)
    batch_size = DEFAULT_BATCH_SIZE if given is ABSENT else _count(given)
    names = ("accumulate_grad_batches", "devices", "num_nodes")
    factors = {name: _count(translation.get(f"trainer.{name}", 1)) for name in names}
    split = [name for name, factor in factors.items() if factor != 1]
    if batch_size is None or not split:
        return
    old = translation.old_key(key) or key
    note = f"{batch_size} rows{' by default' if given is ABSENT else ''}"
    known = [factor for factor in factors.values() if factor is not None]
    if len(known) == len(factors):
        position = translation.position(("trainer", split[0]))
        origin = translation.origins.get(_keys(key), position)
        translation.put(key, batch_size * prod(known), origin)
        note = " x ".join([note, *(f"{factors[name]} {name}" for name in split)])
    else:  # `devices: auto`
        note += " of each device; now they are of all devices together"
    translation.changes = [change for change in translation.changes if change.new != key]
    translation.changes.append(KeyChange(old, key, note))


def _reject_unknown_keys(translation: Translation, old_keys: list[str]) -> None:
    """Rejects the remaining keys of sections that no current file has.

    `model: {hiden_dim: 8}` is an unknown key of the old format; the schema would reject `model`.
    """
    sections = {key.rpartition(".")[0] for key in old_keys} - {""}
    for section in sorted(sections, key=len, reverse=True):
        left = translation.get(section)
        if left is ABSENT or has_key(MODELS[translation.format.command], _keys(section)):
            continue
        known = sorted(k.rpartition(".")[2] for k in old_keys if k.rpartition(".")[0] == section)
        names = listing(known, 20)
        if isinstance(left, dict):
            for key in left:
                hint = did_you_mean(str(key), known)
                position = translation.position((*_keys(section), key))
                translation.problems.append(
                    f"{position}: {section}.{key}: unknown key of the {translation.format.name} "
                    f"format.{hint} Known: {names}"
                )
        elif left is not None:
            translation.reject(section, f"expected a mapping of {names} (got {left!r})")
        translation.remove(section)


def _keys(path: str) -> tuple[str, ...]:
    return tuple(path.split("."))


def _get(tree: Any, keys: Loc, default: Any = ABSENT) -> Any:
    for key in keys:
        if not isinstance(tree, dict) or key not in tree:
            return default
        tree = tree[key]
    return tree


def _count(value: Any) -> int | None:
    """Reads a count as the schema does: `"60"` is 60; None for what the schema rejects."""
    try:
        return COUNT.validate_python(value)
    except ValidationError:
        return None


@dataclass(frozen=True)
class MigratedConfig:
    """The outcome of `migrate_config`."""

    text: str
    """YAML that loads to the same configuration as the old file."""
    command: str | None
    """lora or gen; None for a file in the current format, whose text is unchanged."""


def migrate_config(file: Path, command: str | None = None) -> MigratedConfig:
    """Translates a file of the original scripts to YAML in the current format, with comments.

    `command` is lora or gen if the keys do not decide. Raises UsageError for a missing file, and
    ConfigError with every position for settings that the current format does not support.
    """
    tree, origins = read_yaml(file)
    translation = translate(tree, origins, command)
    if translation is None:
        return MigratedConfig(utf8_text(file, read_bytes(file)), None)
    whose = translation.format.command
    given = Layers(translation.tree, translation.origins, translation.problems)
    wanted = dict(translation.tree)  # validation adds the defaults to the tree
    config = validate_layers(MODELS[whose], given).model_dump(mode="json")
    comments = {change.new: str(change) for change in translation.changes if change.new}
    removed = [f"# {change}\n" for change in translation.changes if change.new is None]
    head = (
        f"# `loragen {whose} train`, migrated from the {translation.format.name} format "
        f"({file.name}).\n"
    )
    body = commented(_restrict(config, wanted), lambda keys: comments.get(dotted(keys), ""))
    return MigratedConfig("".join([head, *removed, body]), whose)


def _restrict(config: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the wanted settings in the schema's order, with their validated values.

    YAML 1.1 reads `1e-4` as text; the schema makes it a number.
    """
    return {
        key: _restrict(value, wanted[key])
        if isinstance(value, Mapping) and isinstance(wanted[key], Mapping)
        else value
        for key, value in config.items()
        if key in wanted
    }
