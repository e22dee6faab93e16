"""Layers -> one validated model: built-in < file < environment < `--set` < flag.

Every value remembers where it came from, so that an error can say `config.yaml:6:5` or `--set`.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from loragen.core.config.schema import PluginSection
from loragen.core.errors import ConfigError, PluginError, UsageError, did_you_mean, listing
from loragen.core.plugins import find

ENV_PREFIX = "LORAGEN_"

Model = TypeVar("Model", bound=BaseModel)
Loc = tuple[str | int, ...]


@dataclass(frozen=True)
class Override:
    """One value from outside the file."""

    keys: Loc
    value: Any
    origin: str
    """How the user gave it: `--set training.batch_size`, `--batch-size`, `LORAGEN_SEED`."""


def load(
    model: type[Model],
    file: Path | None = None,
    settings: Iterable[str] = (),
    flags: Iterable[Override] = (),
    environment: Mapping[str, str] | None = None,
) -> Model:
    """The validated configuration; plugin options are checked by their plugins.

    `settings` are the `key.path=value` texts of `--set`; a value is read as YAML.
    Raises ConfigError with every problem at once, each with its place; UsageError for a missing
    file.
    """
    tree, origins = read_yaml(file) if file else ({}, {})
    layers = (
        list(_from_environment(os.environ if environment is None else environment, model)),
        [_from_setting(text) for text in settings],
        list(flags),
    )
    for layer in layers:
        # A plugin's name first: choosing one forgets the options of another from earlier layers.
        for override in sorted(layer, key=lambda override: override.keys[-1] != "name"):
            if override.keys[0] == "loggers" and len(override.keys) > 1:  # beside the default ones
                tree.setdefault("loggers", deepcopy(model.model_fields["loggers"].default))
            _insert(tree, override)
            origins[override.keys] = override.origin
    problems = _check_plugins(model, tree, origins)
    try:
        config = model.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(*_problems(model, error, origins, ()), *problems) from None
    if problems:
        raise ConfigError(*problems)
    return config


def dump(config: BaseModel) -> str:
    """The resolved configuration as YAML, ready to be loaded again."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def read_yaml(file: Path) -> tuple[dict[str, Any], dict[Loc, str]]:
    """A YAML mapping and the place (`file:line:column`) of each of its keys.

    Raises UsageError for a missing file and ConfigError for YAML that does not parse, is not a
    mapping, or says a key twice.
    """
    if not file.is_file():
        raise UsageError(f"{file}: no such configuration file")
    try:
        node = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not YAML: {' '.join(str(error).split())}") from None
    if node is None:
        return {}, {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}:1: expected a mapping of settings, found {type(tree).__name__}")
    origins: dict[Loc, str] = {}
    for keys, mark in _places(node, ()):
        place = f"{file}:{mark.line + 1}:{mark.column + 1}"
        if keys in origins:
            raise ConfigError(f"{place}: {_dotted(keys)} is given twice; first at {origins[keys]}")
        origins[keys] = place
    return tree, origins


def _places(node: yaml.Node, keys: Loc) -> Iterator[tuple[Loc, yaml.Mark]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*keys, key.value), key.start_mark
            yield from _places(value, (*keys, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*keys, index), value.start_mark
            yield from _places(value, (*keys, index))


def _from_environment(environment: Mapping[str, str], model: type[BaseModel]) -> Iterator[Override]:
    """`LORAGEN_TRAINING__BATCH_SIZE=8` sets `training.batch_size`.

    A variable of a section that this command does not have is another command's.
    """
    for name in sorted(environment):
        keys = tuple(name.removeprefix(ENV_PREFIX).lower().split("__"))
        if name.startswith(ENV_PREFIX) and keys[0] in model.model_fields:
            yield Override(keys, _value(environment[name], name), name)


def _from_setting(text: str) -> Override:
    path, equals, value = text.partition("=")
    if not equals or not path.strip():
        raise UsageError(f"--set {text}: expected key=value, such as training.batch_size=16")
    keys = tuple(int(key) if key.isdigit() else key for key in path.strip().split("."))
    return Override(keys, _value(value, f"--set {text}"), "--set")


def _value(text: str, origin: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UsageError(f"{origin}: the value is not YAML; put quotes around it") from None


def _insert(tree: dict[str, Any], override: Override) -> None:
    node: Any = tree
    for key in override.keys[:-1]:
        child = node.get(key) if isinstance(node, dict) else _item(node, key, override)
        if not isinstance(child, dict | list):
            child = {}
            node[key] = child
        node = child
    last = override.keys[-1]
    if isinstance(node, list):
        _item(node, last, override)
    chooses = last == "name" and override.keys[0] != "launcher"  # launchers share theirs
    if chooses and isinstance(node, dict) and node.get("name") not in (None, override.value):
        node.clear()  # another plugin is chosen: the options beside the old name were not its
    node[last] = override.value


def _item(node: list[Any], key: str | int, override: Override) -> Any:
    if not isinstance(key, int) or key >= len(node):
        raise UsageError(f"{override.origin}: the list has {len(node)} items, counted from 0")
    return node[key]


def _check_plugins(
    model: type[BaseModel], tree: dict[str, Any], origins: Mapping[Loc, str]
) -> list[str]:
    """Validates every plugin's options with its own Config and writes the defaults into `tree`.

    A section that is not even a mapping is left for the schema to complain of.
    """
    problems: list[str] = []
    for field, info in model.model_fields.items():
        given = tree.get(field, {})
        if isinstance(info.default, PluginSection) and isinstance(given, dict):
            name = str(given.get("name", info.default.name))
            options = {key: value for key, value in given.items() if key != "name"}
            options = _validated(info.default.kind, name, options, (field,), origins, problems)
            tree[field] = {"name": name, **options}
        elif field == "loggers" and isinstance(tree.setdefault(field, info.default), dict):
            tree[field] = {
                name: _validated("logger", str(name), options, (field, name), origins, problems)
                for name, options in tree[field].items()
            }
    return problems


def _validated(
    kind: str, name: str, options: Any, loc: Loc, origins: Mapping[Loc, str], problems: list[str]
) -> Any:
    """The options with the plugin's defaults filled in; what is wrong goes to `problems`."""
    options = {} if options is None else options
    if not isinstance(options, dict):
        return options
    try:
        plugin_config = find(kind, name).Config
        return plugin_config.model_validate(options).model_dump(mode="json")
    except PluginError as error:
        problems.append(f"{_place((*loc, 'name'), origins)}{_dotted(loc)}: {error}")
    except ValidationError as error:
        problems += _problems(plugin_config, error, origins, loc)
    return options


def _problems(
    model: type[BaseModel], error: ValidationError, origins: Mapping[Loc, str], prefix: Loc
) -> list[str]:
    """One line per value; a value that fits none of several types gets their reasons in one."""
    reasons: dict[Loc, list[str]] = {}
    given: dict[Loc, str] = {}
    for detail in error.errors():
        keys = (*prefix, *detail["loc"])
        if detail["type"] == "extra_forbidden":
            known = _known_keys(model, detail["loc"][:-1])
            hint = did_you_mean(str(keys[-1]), known)
            reason = f"unknown key.{hint} Known: {listing(known, 20)}"
        elif detail["type"] == "value_error":
            reason = str(detail["ctx"]["error"])
        elif detail["type"] == "missing":
            reason = "is required"
        else:
            keys = _without_type_tags(keys, origins)
            reason = f"{detail['msg'][0].lower()}{detail['msg'][1:]}"
            given[keys] = f" (got {detail['input']!r})"
        reasons.setdefault(keys, []).append(reason)
    return [
        (f"{_place(keys, origins)}{_dotted(keys)}: " if keys else "")
        + " or ".join(dict.fromkeys(of))
        + given.get(keys, "")
        for keys, of in reasons.items()
    ]


def _without_type_tags(keys: Loc, origins: Mapping[Loc, str]) -> Loc:
    """pydantic appends the tried type to the place of a union's value: `devices.int`."""
    for length in range(len(keys), 0, -1):
        if keys[:length] in origins:
            return keys[:length]
    return keys


def _known_keys(model: type[BaseModel], loc: Loc) -> list[str]:
    """The keys of the section at `loc`; walks models, lists of models and optional ones."""
    for part in loc:
        if isinstance(part, int) or part not in model.model_fields:
            continue
        annotation = model.model_fields[part].annotation
        nested = [annotation, *getattr(annotation, "__args__", ())]
        model = next((t for t in nested if isinstance(t, type) and issubclass(t, BaseModel)), model)
    return list(model.model_fields)


def _place(keys: Loc, origins: Mapping[Loc, str]) -> str:
    """Where the value at `keys`, or the nearest section around it, was given."""
    for length in range(len(keys), 0, -1):
        if keys[:length] in origins:
            return f"{origins[keys[:length]]}: "
    return ""


def _dotted(keys: Loc) -> str:
    return ".".join(map(str, keys))
