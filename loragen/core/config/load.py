"""Layers of settings become one validated model: built-in < file < environment < `--set` < flag.

Every value remembers its origin, so that an error can say `config.yaml:6:5` or `--set`. All errors
of a configuration are raised at once, one line each.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import date
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from loragen.core.config.keys import has_key, known_keys, meant
from loragen.core.config.schema import (
    AUTO,
    MODELS,
    NAMELESS,
    GenTrainConfig,
    NoOptions,
    PluginSection,
    command_of,
    phases_in,
)
from loragen.core.config.yaml_file import (
    AmbiguousNumberError,
    Loc,
    dotted,
    leaves,
    parse_yaml,
    paths,
    read_yaml,
)
from loragen.core.errors import ConfigError, PluginError, UsageError, listing
from loragen.core.plugins import describe, find

log = logging.getLogger(__name__)

ENV_PREFIX, TEST_PREFIX = "LORAGEN_", "LORAGEN_TEST_"
"""The prefixes of the variables with settings, and of those that the tests and examples read."""
FOREIGN_KEYS = 3
"""A file with at least this many keys of another command, and none specific to this one, is
rejected as the other command's."""

Model = TypeVar("Model", bound=BaseModel)
Problem = tuple[Loc, str]
"""The path of a value, and what is wrong with it."""


@dataclass(frozen=True)
class Override:
    """One value from outside the file."""

    keys: Loc
    value: Any
    origin: str
    """How the user gave it: `--set`, `--batch-size`, `LORAGEN_SEED`."""


@dataclass(frozen=True)
class Layers:
    """All layers merged into one tree, not yet validated."""

    tree: dict[str, Any]
    origins: dict[Loc, str]
    """The origin of each value that was given; defaults have none."""
    problems: list[str] = field(default_factory=list)
    """Errors found while the tree was built; they are raised with those of the validation."""


def load(
    model: type[Model],
    file: Path | Layers | None = None,
    settings: Iterable[str] = (),
    flags: Iterable[Override] = (),
    environment: Mapping[str, str] | None = None,
    check: Callable[[Model], Iterable[Problem]] | None = None,
) -> Model:
    """Returns the validated configuration; each plugin validates its own options.

    `settings` are the `key.path=value` texts of `--set`; a value is read as YAML. `check` is called
    with what the schema has accepted, and returns problems. It runs before any plugin is imported,
    which may take seconds, and so suits cheap checks, such as whether paths exist.

    Raises ConfigError with all problems at once, each with its origin; UsageError for a missing
    file.
    """
    return validate_layers(model, merge_layers(model, file, settings, flags, environment), check)


def dump(config: BaseModel) -> str:
    """Returns the resolved configuration as YAML, ready to be loaded again."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def merge_layers(
    model: type[BaseModel],
    file: Path | Layers | None = None,
    settings: Iterable[str] = (),
    flags: Iterable[Override] = (),
    environment: Mapping[str, str] | None = None,
) -> Layers:
    """Returns the layers as one tree. Raises UsageError for what cannot be read at all: a missing
    file, `--set nonsense`."""
    merged = _from_file(file, model) if isinstance(file, Path) else file or Layers({}, {})
    for layer in (
        list(_from_environment(os.environ if environment is None else environment, model)),
        [_from_setting(text) for text in settings],
        list(flags),
    ):
        # A plugin's name comes first: choosing one drops the options of another in earlier layers.
        for override in sorted(layer, key=lambda override: not _names_plugin(model, override.keys)):
            _insert(merged, override, model)
    return merged


def validate_layers(
    model: type[Model],
    layers: Layers,
    check: Callable[[Model], Iterable[Problem]] | None = None,
) -> Model:
    """Returns the model of the merged layers, and fills in the defaults of `layers.tree`.

    Raises ConfigError with all problems at once.
    """
    problems = list(layers.problems)
    _fill_in_plugin_names(model, layers.tree)
    try:
        draft = validated(model, layers.tree)
    except ValidationError as error:
        problems = [*problems_of(model, error, layers.origins), *problems]
    if check is not None and not problems:
        problems += [problem_at(keys, layers.origins, problem) for keys, problem in check(draft)]
    # If there are errors already, a plugin without options is not imported: it could add none.
    problems += _check_plugins(model, layers, complete=not problems)
    if problems:
        raise ConfigError(*dict.fromkeys(problems))  # an option is validated with its section, too
    return model.model_validate(layers.tree)


# ---- the layers


def _from_file(file: Path, model: type[BaseModel]) -> Layers:
    """Returns the values of a YAML file with their positions.

    Raises UsageError for a missing file, ConfigError for what is not YAML and for the file of
    another command.
    """
    tree, origins = read_yaml(file)
    own_keys = {keys for keys in origins if has_key(model, keys)}
    for command, other in MODELS.items():
        other_keys = {keys for keys in origins if has_key(other, keys)}
        # Fewer foreign keys may be mistakes.
        if len(other_keys - own_keys) >= FOREIGN_KEYS and not own_keys - other_keys:
            raise ConfigError(
                f"{file}: a configuration of `loragen {command} train`, not of {command_of(model)}"
            )
    return Layers(tree, origins)


def guess_command(file: Path) -> str:
    """Returns the command (lora or gen) whose schema has most of a file's keys; of equals, lora.

    Raises UsageError for a missing file, ConfigError for what is not YAML.
    """
    _, origins = read_yaml(file)
    return max(MODELS, key=lambda command: sum(has_key(MODELS[command], at) for at in origins))


def _from_environment(environment: Mapping[str, str], model: type[BaseModel]) -> Iterator[Override]:
    """Yields what the environment sets: `LORAGEN_TRAINING__BATCH_SIZE=8` is `training.batch_size`.

    A variable of a section that this command does not have is another command's, or a mistake.
    """
    for name in sorted(environment):
        if not name.startswith(ENV_PREFIX) or name.startswith(TEST_PREFIX):
            continue
        keys = parse_keys(name.removeprefix(ENV_PREFIX).lower().split("__"))
        if keys[0] in model.model_fields:
            yield Override(keys, _parse_value(environment[name], name), name)
        else:
            _warn_of_unknown(name, str(keys[0]))


@cache
def _warn_of_unknown(name: str, section: str) -> None:
    """Warns of a variable that no command reads, once per process."""
    known = {key for model in MODELS.values() for key in model.model_fields}
    if section not in known:
        found = next(filter(None, (meant(model, (section,)) for model in MODELS.values())), "")
        variable = ENV_PREFIX + found.partition(":")[0].replace(".", "__").upper()
        if "." not in found:  # a section: the keys below it stay
            variable += name[len(ENV_PREFIX + section) :]
        hint = f" Did you mean {variable}?" if found else ""
        log.warning("%s is ignored: no command has a setting '%s'.%s", name, section, hint)


def _from_setting(text: str) -> Override:
    path, equals, value = text.partition("=")
    if not equals or not path.strip():
        raise UsageError(f"--set {text}: expected key=value, such as training.batch_size=16")
    keys = parse_keys(path.strip().split("."))
    return Override(keys, _parse_value(value, f"--set {text}"), "--set")


def parse_keys(parts: Iterable[str]) -> Loc:
    """Returns the keys; a number is an index of a list."""
    return tuple(int(part) if part.isdecimal() else part for part in parts)


def _parse_value(text: str, origin: str) -> Any:
    try:
        return parse_yaml(text)
    except AmbiguousNumberError as error:
        raise UsageError(f"{origin}: {error.problem}") from None
    except (yaml.YAMLError, RecursionError):
        raise UsageError(f"{origin}: the value is not YAML; put quotes around it") from None


def _names_plugin(model: type[BaseModel], keys: Loc) -> bool:
    """Returns whether `keys` are a plugin section's `name`; other sections may have one too."""
    info = model.model_fields.get(str(keys[0]))
    return info is not None and isinstance(info.default, PluginSection) and keys[1:] == ("name",)


def _insert(layers: Layers, override: Override, model: type[BaseModel]) -> None:
    """Puts a value into the tree, and replaces the value of earlier layers."""
    keys, replaced = override.keys, override.keys
    if keys[0] == "loggers" and len(keys) > 1:  # the other default loggers stay
        layers.tree.setdefault("loggers", deepcopy(model.model_fields["loggers"].default))
    node: Any = layers.tree
    for depth, key in enumerate(keys):
        if isinstance(node, list) and not (isinstance(key, int) and key < len(node)):
            size = f"has {len(node)} items, 0 to {len(node) - 1}" if node else "is empty"
            raise UsageError(
                f"{override.origin}: {dotted(keys)}: index {key} is out of range; the list {size}"
            )
        if depth == len(keys) - 1:
            break
        child = node.get(key) if isinstance(node, dict) else node[key]
        if not isinstance(child, dict | list):
            child = node[key] = {}
        node = child
    if _names_plugin(model, keys) and _name_in(node, model, keys) not in (None, override.value):
        node.clear()  # the options beside the old name belong to the other plugin
        replaced = keys[:-1]
    node[keys[-1]] = override.value
    for at in [at for at in layers.origins if at[: len(replaced)] == replaced and at != replaced]:
        del layers.origins[at]
    for at in paths(override.value, keys):
        layers.origins[at] = override.origin


# ---- plugins


def _name_in(section: dict[str, Any], model: type[BaseModel], keys: Loc) -> str | None:
    """Returns the plugin's name in a section, or that of the plugin whose options it has."""
    default = model.model_fields[str(keys[0])].default.name
    nameless = NAMELESS.get(default) if section else None
    name: str | None = section.get("name", nameless)
    return name


def _fill_in_plugin_names(model: type[BaseModel], tree: dict[str, Any]) -> None:
    """Writes the default plugin's name if none is given, and `{}` for a logger's `null`.

    The schema refuses a section that is not a mapping.
    """
    for key, info in model.model_fields.items():
        section = tree.setdefault(key, {}) if isinstance(info.default, PluginSection) else None
        if isinstance(section, dict):  # a name may be any YAML scalar
            default = info.default.name
            default = NAMELESS.get(default, default) if section else default
            tree[key] = {**section, "name": str(section.get("name", default))}
    loggers = tree.setdefault("loggers", model.model_fields["loggers"].default)
    if isinstance(loggers, dict):
        tree["loggers"] = {
            name: {} if options is None else options for name, options in loggers.items()
        }


def _check_plugins(model: type[BaseModel], layers: Layers, complete: bool) -> list[str]:
    """Validates every plugin's options with its own Config, and returns the problems.

    With `complete`, the defaults are written into the tree too, and every plugin is imported.
    """
    problems: list[str] = []

    def check(kind: str, name: str, options: Any, keys: Loc) -> Any:
        if not isinstance(options, dict):
            return options
        try:
            chosen_later = (kind, name) == ("decoder", AUTO)
            if not options and not complete:
                _ = chosen_later or describe(kind, name)
                return options
            plugin_config = NoOptions if chosen_later else find(kind, name).Config
            return validated(plugin_config, options).model_dump(mode="json")
        except PluginError as error:
            origin = origin_of((*keys, "name"), layers.origins)
            others = ", auto, or several as A-then-B" if kind == "objective" else ""
            problems.append(f"{f'{origin}: ' if origin else ''}{dotted(keys)}: {error}{others}")
        except ValidationError as error:
            problems.extend(problems_of(plugin_config, error, layers.origins, keys))
        return options

    for key, info in model.model_fields.items():
        section = layers.tree[key] if isinstance(info.default, PluginSection) else None
        if isinstance(section, dict):
            name = section["name"]
            options = {option: value for option, value in section.items() if option != "name"}
            layers.tree[key] = {"name": name, **check(key, name, options, (key,))}
    loggers = layers.tree["loggers"]
    if isinstance(loggers, dict):
        layers.tree["loggers"] = {
            name: check("logger", str(name), options, ("loggers", name))
            for name, options in loggers.items()
        }
    training = layers.tree.get("training")
    if model is GenTrainConfig and isinstance(training, dict):
        objective, all_options = training.get("objective"), training.get("objective_options")
        for name in phases_in(objective) if isinstance(objective, str) else ():
            if name != AUTO:
                check("objective", name, {}, ("training", "objective"))
        if isinstance(all_options, dict):
            training["objective_options"] = {
                name: check("objective", name, options, ("training", "objective_options", name))
                for name, options in all_options.items()
            }
    return problems


# ---- problems


def validated(model: type[Model], values: Any) -> Model:
    """Returns the model of plain values. Raises ValidationError, also for `yes`, `on` or `true` as
    a number: pydantic would take it for 1; and for NaN and infinity, which JSON makes null."""
    problems: list[Any] = []
    try:
        made = model.model_validate(values)
    except ValidationError as error:
        problems = list(error.errors())
    else:
        problems = [
            {"type": "finite_number", "loc": keys, "input": value}
            for keys, value in leaves(made.model_dump())
            if isinstance(value, float) and not isfinite(value)
        ]
    try:
        model.model_validate(values, strict=True)
    except ValidationError as error:
        no_number = PydanticCustomError("bool", "Expected a number, not yes or no")
        found = {
            detail["loc"]: {**detail, "type": no_number}
            for detail in error.errors()
            if detail["type"] in ("int_type", "float_type") and isinstance(detail["input"], bool)
        }
        problems = [one for one in problems if one["loc"] not in found] + [*found.values()]
    if problems:
        raise ValidationError.from_exception_data(model.__name__, problems)
    return made


def problems_of(
    model: type[BaseModel], error: ValidationError, origins: Mapping[Loc, str], prefix: Loc = ()
) -> list[str]:
    """Returns one line per value; if it fits none of several types, the line has all reasons."""
    reasons: dict[Loc, list[str]] = {}
    given: dict[Loc, str] = {}
    for detail in error.errors():
        keys, kind = (*prefix, *detail["loc"]), detail["type"]
        if kind == "extra_forbidden":
            known = known_keys(model, detail["loc"][:-1])
            found = meant(model, detail["loc"])
            hint = f" Did you mean '{found}'?" if found else ""
            reason = f"unknown key.{hint} Known: {listing(known, 20)}"
        elif kind == "value_error":
            reason = str(detail["ctx"]["error"])
        elif kind == "missing":
            reason = "is required"
        else:
            # pydantic appends a type to the location of a value in a union: `devices.int`.
            keys = _given(keys, origins) or keys
            given[keys] = f" (got {detail['input']!r})"
            if kind == "string_type" and isinstance(detail["input"], bool | int | float | date):
                given[keys] += "; put quotes around it"
            reason = f"{detail['msg'][0].lower()}{detail['msg'][1:]}"
            if kind == "model_type":
                known = known_keys(model, detail["loc"])
                reason = f"input should be a section with the keys {listing(known, 20)}"
        reasons.setdefault(keys, []).append(reason)
    return [
        problem_at(keys, origins, " or ".join(dict.fromkeys(of)) + given.get(keys, ""))
        for keys, of in reasons.items()
    ]


def problem_at(keys: Loc, origins: Mapping[Loc, str], problem: str) -> str:
    """Returns `c.yaml:6:5: training.batch_size: <problem>`; without keys, the problem is one of the
    whole configuration."""
    parts = [origin_of(keys, origins), dotted(keys), problem]
    return ": ".join(part for part in parts if part)


def origin_of(keys: Loc, origins: Mapping[Loc, str]) -> str | None:
    """Returns where the value, the nearest section around it, or one below it was given; None for a
    default."""
    below = (at for at in origins if keys and at[: len(keys)] == keys)
    at = _given(keys, origins) or next(below, None)
    return origins[at] if at else None


def _given(keys: Loc, origins: Mapping[Loc, str]) -> Loc | None:
    """Returns the path of the value, or of the nearest section around it that was given."""
    around = (keys[:length] for length in range(len(keys), 0, -1))
    return next((at for at in around if at in origins), None)


def problems_at(keys: Loc, check: Callable[..., object], *arguments: object) -> list[Problem]:
    """Returns what `check(*arguments)` raises as UsageError, as problems of the value at `keys`."""
    try:
        check(*arguments)
    except UsageError as error:
        return [(keys, problem) for problem in error.problems]
    return []
