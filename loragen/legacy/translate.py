"""Whose configuration a file is, and in which form, by its keys.

An old configuration (`legacy`) in today's words; every value keeps the place it was given at.

An old configuration file as today's, with a comment wherever it says something else.
"""

import logging
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from pydantic import BaseModel, NonNegativeInt, TypeAdapter, ValidationError

from loragen.core.config.load import Layers, has_key, origin_of, validate_layers
from loragen.core.config.schema import MODELS, TrainerSection, command_of
from loragen.core.config.yaml_file import Loc, commented, dotted, inline, read_yaml
from loragen.core.config.yaml_file import paths as all_paths
from loragen.core.errors import ConfigError, did_you_mean, listing
from loragen.legacy.forms import ANYTHING, CONVERTERS, FORMS, GONE, NOTES, STAGE2_STEPS, Form

log = logging.getLogger(__name__)

SHARED = {
    "": {"seed"},
    "data": {
        "dataset",
        "max_length",
        "val_ratio",
        "checkpoint_dir",
        "batch_size",
        "samples_per_prompt",
        "max_checkpoints",
        "cache_tokenized",
    },
    "lora": {"dropout", "target_modules"},
    "training": {
        "batch_size",
        "max_steps",
        "max_epochs",
        "learning_rate",
        "weight_decay",
        "mse_weight",
        "l1_weight",
    },
    "trainer": set(TrainerSection.model_fields),
}
"""Keys that old files and today's have alike; any other of today's schema is today's alone."""


def read_old_file(file: Path, model: type[BaseModel]) -> Layers | None:
    """The values of a file of the original scripts under the names of today, with the places where
    they were given, and one warning; None for a file that is not one of theirs.

    Raises ConfigError for an old file of another command.
    """
    tree, origins = read_yaml(file)
    command = command_of(model)
    other = of_another_command(tree, command)
    if other is not None:
        raise ConfigError(
            f"{file}: in the {other.name} form, which is for `loragen {other.command} train`"
        )
    old = translated(tree, origins, command)
    if old is None:
        return None
    log.warning("%s", old.notice(file))
    return Layers(old.tree, old.origins, old.problems)


def old_command_of(file: Path) -> str | None:
    """Whose configuration an old file is: lora or gen; None for a file that is not an old one."""
    form = recognised(read_yaml(file)[0])
    return form.command if form else None


def recognised(tree: Mapping[str, Any], command: str | None = None) -> Form | None:
    """The form, of the command's where that is told, that knows most of the file's keys; None for
    a file without a sign."""
    signed = [f for f in FORMS if command in (None, f.command) and _signs(tree, f)]
    return max(signed, key=lambda form: _known(tree, form), default=None)


def mostly_todays(tree: Mapping[str, Any], form: Form) -> bool:
    """Whether an old key stands in a file of today, rather than one of today in an old file."""
    paths = [keys for keys in all_paths(tree) if keys]
    old = {*form.moved, *form.dropped, *STAGE2_STEPS} & set(map(dotted, paths))
    todays = [keys for keys in paths if _is_todays_alone(keys, form)]
    return any(len(keys) == 1 for keys in todays) or len(todays) >= max(1, len(old))


def _is_todays_alone(keys: Loc, form: Form) -> bool:
    *section, key = map(str, keys)
    shared = SHARED.get(".".join(section), set())
    return has_key(MODELS[form.command], keys) and key not in shared and dotted(keys) not in SHARED


def of_another_command(tree: Mapping[str, Any], command: str) -> Form | None:
    """The form of the other command that the file plainly is in; one sign may be a mistake."""
    others = [form for form in FORMS if form.command != command]
    ours = [form for form in FORMS if form.command == command]
    best = max(others, key=lambda form: _signs(tree, form))
    plain = _signs(tree, best) > max(1, *(_signs(tree, form) for form in ours))
    return best if plain else None


def _signs(tree: Mapping[str, Any], form: Form) -> int:
    return sum(_has(tree, sign) for sign in form.signs)


def _known(tree: Mapping[str, Any], form: Form) -> int:
    paths = {".".join(map(str, keys)) for keys in all_paths(tree) if keys}
    ours = {*form.signs, *form.moved, *form.dropped}
    model = MODELS[form.command]
    return sum(path in ours or has_key(model, tuple(path.split("."))) for path in paths)


def _has(tree: Any, path: str) -> bool:
    for key in path.split("."):
        if not isinstance(tree, Mapping) or key not in tree:
            return False
        tree = tree[key]
    return True


SPLITS = ("accumulate_grad_batches", "devices", "num_nodes")
DEFAULT_BATCH = 32
"""Rows, of the scripts."""
COUNT = TypeAdapter(NonNegativeInt)
REST = "stage 2 is the rest of training.max_steps"


@dataclass(frozen=True)
class Change:
    """What became of one old key."""

    old: str
    new: str | None
    """None where it has no place today."""
    note: str = ""
    """Why the value is another one; empty where the key alone changed its name."""
    quiet: bool = False
    """Nothing is lost: it is told in the migrated file, not whenever the old one is read."""

    def __str__(self) -> str:
        if self.new is None:
            return f"{self.old} is dropped: {self.note}"
        return f"was {self.old}{': ' if self.note else ''}{self.note}"


@dataclass
class Translation:
    form: Form
    tree: dict[str, Any]
    origins: dict[Loc, str]
    problems: list[str] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    option: str = ""
    """What `config migrate` has to be told where the keys alone mean another command."""

    def notice(self, file: Path) -> str:
        """One line: what kind of file this is, and which values are not what it says."""
        told = [change for change in self.changes if change.note and not change.quiet]
        form = (
            f"{file} is in the {self.form.name} form; "
            f"`loragen config migrate {file}{self.option}` prints today's"
        )
        return "; ".join([form, *(f"{c.new or ''} {c}".lstrip() for c in told)])

    def place(self, keys: Loc) -> str:
        """`file:line:column: ` of the key."""
        origin = origin_of(keys, self.origins)
        return f"{origin}: " if origin else ""

    def old_name(self, new: str) -> str | None:
        return next((change.old for change in self.changes if change.new == new), None)


def translated(
    tree: Mapping[str, Any], origins: Mapping[Loc, str], command: str | None = None
) -> Translation | None:
    """Today's tree and places of an old file; None for a file that is not an old one.

    `command` is whose configuration is wanted, where that is known. In a file that is mostly
    today's, only keys that no file of today can have are translated: the rest is judged as today's.
    """
    form = recognised(tree, command)
    if form is None:
        return None
    done = Translation(form, deepcopy(dict(tree)), dict(origins))
    if (recognised(tree) or form).command != form.command:
        done.option = f" --command {form.command}"
    mixed = mostly_todays(tree, form)
    moved = {old: new for old, new in form.moved.items() if _applies(form, old, mixed)}
    dropped = [old for old in form.dropped if _applies(form, old, mixed)]
    for old, new in moved.items():
        _move(done, tuple(old.split(".")), tuple(new.split(".")), moved)
    for old in dropped:
        _drop(done, tuple(old.split(".")))
    if form.command == "lora":
        _stage2_steps(done)
        _first_kept_step(done)
        _whole_batch(done, mixed)
        dropped += STAGE2_STEPS
    _loggers(done)
    _leftovers(done, [*moved, *dropped])
    return done


def _applies(form: Form, old: str, mixed: bool) -> bool:
    """Not to a key that today's schema has, nor, in a mixed file, to one that is no sign."""
    if has_key(MODELS[form.command], tuple(old.split("."))):
        return False
    return not mixed or any(old == sign or old.startswith(f"{sign}.") for sign in form.signs)


def _move(done: Translation, old: Loc, new: Loc, moved: Mapping[str, str]) -> None:
    value = _value(done.tree, old)
    if value is GONE or (isinstance(value, dict) and _is_section(dotted(old), moved)):
        return
    convert = CONVERTERS.get(dotted(old))
    given, value = value, convert(value) if convert else value
    place = done.place(old)
    _take(done, old)
    if value is GONE:
        return
    there = _in_the_way(done.tree, new)
    if there:
        done.problems.append(
            f"{place}{dotted(old)}: {dotted(there)} is given too, at {done.place(there)[:-2]}"
        )
        return
    _put(done.tree, new, value)
    done.origins[new] = f"{place[:-2]} ({dotted(old)})"
    for keys in [keys for keys in done.origins if keys[: len(old)] == old]:
        done.origins[(*new, *keys[len(old) :])] = f"{done.origins.pop(keys)} ({dotted(keys)})"
    note = "" if value == given else ", ".join([inline(given), *NOTES.get(dotted(old), ())])
    done.changes.append(Change(dotted(old), dotted(new), note))


def _drop(done: Translation, old: Loc) -> None:
    value = _value(done.tree, old)
    if value is GONE:
        return
    rule = done.form.dropped[dotted(old)]
    told = f"{dotted(old)}: {inline(value)}"
    if ANYTHING in rule.harmless or value in rule.harmless:
        quiet = ANYTHING not in rule.harmless
        done.changes.append(Change(told, None, rule.advice, quiet))
    else:
        done.problems.append(f"{done.place(old)}{told} has no place today: {rule.advice}")
    _take(done, old)


def _stage2_steps(done: Translation) -> None:
    """Today stage 2 is the rest of `training.max_steps`."""
    for path in STAGE2_STEPS:
        old = tuple(path.split("."))
        steps = _value(done.tree, old)
        if steps is GONE:
            continue
        place = done.place(old)
        _take(done, old)
        key = ("training", "max_steps")
        stage1 = _count(_value(done.tree, ("schedule", "stage1_steps"), 75))
        given, total = _value(done.tree, key), _count(_value(done.tree, key))
        stage2 = _count(steps)
        if stage2 is None:
            done.problems.append(f"{place}{path}: expected a number of steps (got {steps!r})")
        elif stage1 is None or (given is not GONE and total is None):
            continue  # the schema refuses it
        elif total is None:
            _put(done.tree, key, stage1 + stage2)
            done.origins[key] = f"{place[:-2]} ({path})"
            done.changes.append(Change(path, dotted(key), f"{steps}, and {stage1} of stage 1"))
        elif stage2 != total - stage1:
            done.problems.append(
                f"{place}{path}: {stage2} steps, but training.max_steps leaves {total - stage1} "
                f"for stage 2 ({total} - {stage1}): let them agree"
            )
        else:
            done.changes.append(Change(f"{path}: {steps}", None, REST, quiet=True))


def _first_kept_step(done: Translation) -> None:
    """The old scripts kept the steps of stage 2, wherever it began."""
    stage1 = _count(_value(done.tree, ("schedule", "stage1_steps")))
    first = ("checkpoints", "first_step")
    old = done.old_name("schedule.stage1_steps")
    if old and stage1 not in (None, 75) and _value(done.tree, first) is GONE:
        _put(done.tree, first, stage1 + 1)
        done.origins[first] = done.origins["schedule", "stage1_steps"]
        note = f"{stage1}, and the steps of stage 2 were kept"
        done.changes.append(Change(old, dotted(first), note))


def _whole_batch(done: Translation, mixed: bool) -> None:
    """The old batch was one device's micro-batch; today's is the whole optimizer step's."""
    key = ("training", "batch_size")
    old = done.old_name(dotted(key))
    if mixed and old is None:
        return
    given = _value(done.tree, key)
    batch = DEFAULT_BATCH if given is GONE else _count(given)
    parts = {name: _count(_value(done.tree, ("trainer", name), 1)) for name in SPLITS}
    split = [name for name, count in parts.items() if count != 1]
    if batch is None or not split:
        return
    note = f"{batch} rows{' by default' if given is GONE else ''}"
    counts = [count for count in parts.values() if count is not None]
    if len(counts) == len(parts):
        _put(done.tree, key, batch * prod(counts))
        done.origins.setdefault(key, done.place(("trainer", split[0]))[:-2])
        note = " x ".join([note, *(f"{parts[name]} {name}" for name in split)])
    else:  # devices: auto
        note += ", of each device; now they are of all together"
    done.changes = [change for change in done.changes if change.new != dotted(key)]
    done.changes.append(Change(old or dotted(key), dotted(key), note))


def _loggers(done: Translation) -> None:
    """A file that names loggers names all of them; the scripts always had both."""
    loggers = done.tree.get("loggers")
    if isinstance(loggers, dict) and any(
        done.old_name(f"loggers.{name}") for name in ("tensorboard", "swanlab")
    ):
        both: dict[str, Any] = {"tensorboard": {}, "swanlab": {}} | loggers
        done.tree["loggers"] = {name: of for name, of in both.items() if of is not False}


def _leftovers(done: Translation, paths: list[str]) -> None:
    """Keys of sections that today's files do not have: today's schema would only say `model`."""
    model = MODELS[done.form.command]
    sections = {path.rpartition(".")[0] for path in paths} - {""}
    for path in sorted(sections, key=len, reverse=True):
        section = tuple(path.split("."))
        left = _value(done.tree, section)
        if left is GONE or has_key(model, section):
            continue
        known = sorted(p.rpartition(".")[2] for p in paths if p.rpartition(".")[0] == path)
        for key in left if isinstance(left, dict) else ():
            done.problems.append(
                f"{done.place((*section, key))}{path}.{key}: unknown key, today and in the "
                f"{done.form.name} form.{did_you_mean(str(key), known)} Known: {listing(known, 20)}"
            )
        if left is not None and not isinstance(left, dict):
            done.problems.append(
                f"{done.place(section)}{path}: expected a mapping of {listing(known, 20)} "
                f"(got {left!r})"
            )
        _take(done, section)


def _is_section(old: str, moved: Mapping[str, str]) -> bool:
    """`model: {name: ...}` beside `model: NAME`."""
    return any(path.startswith(f"{old}.") for path in moved)


def _count(value: Any) -> int | None:
    """As the schema reads it: `"60"` is 60; None for what the schema refuses."""
    try:
        return COUNT.validate_python(value)
    except ValidationError:
        return None


def _value(tree: Any, keys: Loc, default: Any = GONE) -> Any:
    for key in keys:
        if not isinstance(tree, dict) or key not in tree:
            return default
        tree = tree[key]
    return tree


def _in_the_way(tree: dict[str, Any], new: Loc) -> Loc | None:
    """Where a value cannot go: it is there already, or a section on the way is none."""
    for length in range(1, len(new)):
        section = _value(tree, new[:length])
        if section is not GONE and section is not None and not isinstance(section, dict):
            return new[:length]
    return None if _value(tree, new) is GONE else new


def _put(tree: dict[str, Any], keys: Loc, value: Any) -> None:
    for key in keys[:-1]:
        if not isinstance(tree.get(str(key)), dict):
            tree[str(key)] = {}
        tree = tree[str(key)]
    tree[str(keys[-1])] = value


def _take(done: Translation, keys: Loc) -> None:
    """Removes a value, and the sections that it leaves empty."""
    parent = _value(done.tree, keys[:-1])
    del parent[keys[-1]]
    if not parent and len(keys) > 1:
        _take(done, keys[:-1])


@dataclass(frozen=True)
class Migrated:
    text: str
    """YAML that loads to the same configuration as the old file."""
    command: str | None
    """lora or gen; None for a file that is not an old one, whose text is as it was."""


def migrate(file: Path, command: str | None = None) -> Migrated:
    """`command` is lora or gen where the keys alone would not tell.

    Raises UsageError for a missing file; ConfigError, with every place, for an old file that
    says what today's form cannot."""
    tree, origins = read_yaml(file)
    old = translated(tree, origins, command)
    if old is None:
        return Migrated(file.read_text(encoding="utf-8-sig"), None)
    model = MODELS[old.form.command]
    given = Layers(old.tree, old.origins, old.problems)
    wanted = dict(old.tree)  # validation adds the defaults
    config = validate_layers(model, given).model_dump(mode="json")
    return Migrated(_text(file, old, _picked(config, wanted)), old.form.command)


def _picked(config: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The wanted settings in the schema's order, their values as validated (`1e-4`, a text to
    YAML, is a number)."""
    return {
        key: _picked(value, wanted[key])
        if isinstance(value, Mapping) and isinstance(wanted[key], Mapping)
        else value
        for key, value in config.items()
        if key in wanted
    }


def _text(file: Path, old: Translation, tree: Mapping[str, Any]) -> str:
    changed = {change.new: str(change) for change in old.changes if change.new}
    dropped = [f"# {change}\n" for change in old.changes if change.new is None]
    head = (
        f"# `loragen {old.form.command} train`, migrated from the {old.form.name} form "
        f"({file.name}).\n"
    )
    return head + "".join(dropped) + commented(tree, lambda keys: changed.get(dotted(keys), ""))
