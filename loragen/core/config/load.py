"""What is wrong with a configuration: one line per value, with its place and what exists.

Layers -> one validated model: built-in < file < environment < `--set` < flag.

Every value remembers where it came from, so that an error can say `config.yaml:6:5` or `--set`.
"""

import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from loragen.core.config.schema import MODELS, PluginSection, command_of
from loragen.core.config.yaml_file import Loc, dotted, paths, read_yaml
from loragen.core.errors import ConfigError, PluginError, UsageError, did_you_mean, listing
from loragen.core.plugins import describe, find

log = logging.getLogger(__name__)

Misplaced = tuple[Loc, str]
"""The keys of a value that names something that is not there, and what is wrong with it."""


def refused(keys: Loc, look: Callable[[], object]) -> list[Misplaced]:
    """What a look at the place that a value names has to complain of."""
    try:
        look()
    except UsageError as error:
        return [(keys, problem) for problem in error.problems]
    return []


def problems_of(
    model: type[BaseModel], error: ValidationError, origins: Mapping[Loc, str], prefix: Loc = ()
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
        elif detail["type"] == "model_type":
            keys = _without_type_tags(keys, origins)
            known = _known_keys(model, detail["loc"])
            reason = f"has to be a section with keys of its own: {listing(known, 20)}"
            given[keys] = f" (got {detail['input']!r})"
        elif detail["type"] == "missing":
            reason = "is required"
        else:
            keys = _without_type_tags(keys, origins)
            reason = f"{detail['msg'][0].lower()}{detail['msg'][1:]}"
            given[keys] = f" (got {detail['input']!r})"
        reasons.setdefault(keys, []).append(reason)
    return [
        (f"{place_of(keys, origins)}{dotted(keys)}: " if keys else "")
        + " or ".join(dict.fromkeys(of))
        + given.get(keys, "")
        for keys, of in reasons.items()
    ]


def place_of(keys: Loc, origins: Mapping[Loc, str]) -> str:
    """Where the value at `keys`, or the nearest section around it, was given; ends in `: `."""
    origin = origin_of(keys, origins)
    return f"{origin}: " if origin else ""


def origin_of(keys: Loc, origins: Mapping[Loc, str]) -> str | None:
    for length in range(len(keys), 0, -1):
        if keys[:length] in origins:
            return origins[keys[:length]]
    return None


def has_key(model: type[BaseModel], keys: Loc) -> bool:
    """Whether the schema itself has this key; the options of plugins are not in it."""
    for part in keys[:-1]:
        section = _section(model, part)
        if section is None:
            return False
        model = section
    return keys[-1] in model.model_fields


def _without_type_tags(keys: Loc, origins: Mapping[Loc, str]) -> Loc:
    """pydantic appends the tried type to the place of a union's value: `devices.int`."""
    for length in range(len(keys), 0, -1):
        if keys[:length] in origins:
            return keys[:length]
    return keys


def _known_keys(model: type[BaseModel], loc: Loc) -> list[str]:
    """The keys of the section at `loc`; walks models, lists of models and optional ones."""
    for part in loc:
        model = _section(model, part) or model
    return list(model.model_fields)


def _section(model: type[BaseModel], key: Any) -> type[BaseModel] | None:
    """The model of a field, or of its items; None where the field is a plain value."""
    if not isinstance(key, str) or key not in model.model_fields:
        return None
    annotation = model.model_fields[key].annotation
    nested = [annotation, *getattr(annotation, "__args__", ())]
    return next((t for t in nested if isinstance(t, type) and issubclass(t, BaseModel)), None)


ENV_PREFIX = "LORAGEN_"
MOST_FOREIGN_KEYS = 3


Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Override:
    """One value from outside the file."""

    keys: Loc
    value: Any
    origin: str
    """How the user gave it: `--set training.batch_size`, `--batch-size`, `LORAGEN_SEED`."""


@dataclass(frozen=True)
class Given:
    """All layers in one tree, before it is validated."""

    tree: dict[str, Any]
    origins: dict[Loc, str]
    """Where each value was given; a default is not in it."""
    problems: list[str]
    """What the translation of an old file refused."""


def load(
    model: type[Model],
    file: "Path | Given | None" = None,
    settings: Iterable[str] = (),
    flags: Iterable[Override] = (),
    environment: Mapping[str, str] | None = None,
    early: Callable[[Model], Iterable[Misplaced]] | None = None,
) -> Model:
    """The validated configuration; plugin options are checked by their plugins.

    `settings` are the `key.path=value` texts of `--set`; a value is read as YAML. `early` is
    called with what the schema alone has accepted, before any plugin is imported, which may take
    seconds: the place for cheap checks that raise, or tell what is not where a value says.
    Raises ConfigError with every problem at once, each with its place; UsageError for a missing
    file.
    """
    return validate_layers(model, layered(model, file, settings, flags, environment), early)


def layered(
    model: type[BaseModel],
    file: Path | Given | None = None,
    settings: Iterable[str] = (),
    flags: Iterable[Override] = (),
    environment: Mapping[str, str] | None = None,
) -> Given:
    """Raises UsageError for what cannot be read at all, a missing file or `--set nonsense`."""
    given = read_file(file, model) if isinstance(file, Path) else file or Given({}, {}, [])
    layers = (
        list(_from_environment(os.environ if environment is None else environment, model)),
        [_from_setting(text) for text in settings],
        list(flags),
    )
    for layer in layers:
        # A plugin's name first: choosing one forgets the options of another from earlier layers.
        for override in sorted(layer, key=lambda override: not _chooses(model, override.keys)):
            if override.keys[0] == "loggers" and len(override.keys) > 1:  # beside the default ones
                default = deepcopy(model.model_fields["loggers"].default)
                given.tree.setdefault("loggers", default)
            _insert(given.tree, override, _chooses(model, override.keys))
            for keys in [keys for keys in given.origins if not _is_there(given.tree, keys)]:
                del given.origins[keys]  # the override has replaced what was around it
            for keys in paths(override.value, override.keys):
                given.origins[keys] = override.origin
    return given


def validate_layers(
    model: type[Model],
    given: Given,
    early: Callable[[Model], Iterable[Misplaced]] | None = None,
) -> Model:
    """The model of what was given. Raises ConfigError with every problem at once."""
    problems = list(given.problems)
    _name_plugins(model, given.tree)
    try:
        draft = model.model_validate(given.tree)
    except ValidationError as error:
        problems = [*problems_of(model, error, given.origins), *problems]
    if early is not None and not problems:
        problems += [
            f"{place_of(keys, given.origins)}{dotted(keys)}: {problem}"
            for keys, problem in early(draft)
        ]
    # With an error already, a plugin without options has nothing to add that is worth its import.
    problems += _check_plugins(model, given, complete=not problems)
    if problems:
        raise ConfigError(*problems)
    return model.model_validate(given.tree)


def dump(config: BaseModel) -> str:
    """The resolved configuration as YAML, ready to be loaded again."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def read_file(file: Path, model: type[BaseModel]) -> Given:
    """The values of a YAML file with their places, not yet validated.

    Raises UsageError for a missing file, ConfigError for what is not YAML and for the file of
    another command.
    """
    tree, origins = read_yaml(file)
    owner = _owner(origins, command_of(model))
    if owner is not None:
        raise ConfigError(
            f"{file}: a configuration of `loragen {owner} train`, not of {command_of(model)}"
        )
    return Given(tree, origins, [])


def command_for(file: Path) -> str:
    """Whose configuration a file is, by its keys: lora or gen; lora where they tell nothing.

    Raises UsageError for a missing file, ConfigError for what is not YAML.
    """
    _, origins = read_yaml(file)
    known = {
        command: sum(has_key(model, keys) for keys in origins) for command, model in MODELS.items()
    }
    return max(known, key=lambda command: known[command])


def _owner(places: Collection[Loc], command: str) -> str | None:
    """Another command whose file this plainly is: it has `MOST_FOREIGN_KEYS` keys or more of that
    command alone, and none of ours alone. Fewer may be mistakes."""
    ours = {keys for keys in places if has_key(MODELS[command], keys)}
    for other, model in MODELS.items():
        theirs = {keys for keys in places if has_key(model, keys)}
        if len(theirs - ours) >= MOST_FOREIGN_KEYS and not ours - theirs:
            return other
    return None


def _from_environment(environment: Mapping[str, str], model: type[BaseModel]) -> Iterator[Override]:
    """`LORAGEN_TRAINING__BATCH_SIZE=8` sets `training.batch_size`.

    A variable of a section that this command does not have is another command's, or a mistake.
    """
    for name in sorted(environment):
        keys = _keys(name.removeprefix(ENV_PREFIX).lower().split("__"))
        if not name.startswith(ENV_PREFIX):
            continue
        if keys[0] in model.model_fields:
            yield Override(keys, _value(environment[name], name), name)
        else:
            _warn_of_unknown(name, str(keys[0]))


@cache
def _warn_of_unknown(name: str, section: str) -> None:
    """Once per process, however often a configuration is loaded."""
    known = {key for model in MODELS.values() for key in model.model_fields}
    if section not in known:
        hint = did_you_mean(section, sorted(known))
        log.warning("%s is ignored: no command has a setting '%s'.%s", name, section, hint)


def _from_setting(text: str) -> Override:
    path, equals, value = text.partition("=")
    if not equals or not path.strip():
        raise UsageError(f"--set {text}: expected key=value, such as training.batch_size=16")
    return Override(_keys(path.strip().split(".")), _value(value, f"--set {text}"), "--set")


def _keys(parts: Iterable[str]) -> Loc:
    """A number is a place in a list."""
    return tuple(int(part) if part.isdecimal() else part for part in parts)


def _value(text: str, origin: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: of 2025-13-01, a date
        raise UsageError(f"{origin}: the value is not YAML; put quotes around it") from None


def _chooses(model: type[BaseModel], keys: Loc) -> bool:
    """Whether this is the name of a section's plugin; other things may have a name, too."""
    info = model.model_fields.get(str(keys[0]))
    return info is not None and isinstance(info.default, PluginSection) and keys[1:] == ("name",)


def _insert(tree: dict[str, Any], override: Override, chooses: bool) -> None:
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
    if chooses and isinstance(node, dict) and node.get("name") not in (None, override.value):
        node.clear()  # another plugin is chosen: the options beside the old name were not its
    node[last] = override.value


def _is_there(tree: Any, keys: Loc) -> bool:
    for key in keys:
        items = dict(enumerate(tree)) if isinstance(tree, list) else tree
        if not isinstance(items, dict) or key not in items:
            return False
        tree = items[key]
    return True


def _item(node: list[Any], key: str | int, override: Override) -> Any:
    if not isinstance(key, int) or key >= len(node):
        raise UsageError(f"{override.origin}: the list has {len(node)} items, counted from 0")
    return node[key]


def _name_plugins(model: type[BaseModel], tree: dict[str, Any]) -> None:
    """Writes the default plugin's name where none is given; `name:` may be any text in YAML.

    A section that is not even a mapping is left for the schema to complain of.
    """
    for field, info in model.model_fields.items():
        section = tree.setdefault(field, {}) if isinstance(info.default, PluginSection) else None
        if isinstance(section, dict):
            tree[field] = {**section, "name": str(section.get("name", info.default.name))}
        elif field == "loggers" and isinstance(tree.setdefault(field, info.default), dict):
            tree[field] = {
                name: {} if options is None else options for name, options in tree[field].items()
            }


def _check_plugins(model: type[BaseModel], given: Given, complete: bool) -> list[str]:
    """Validates every plugin's options with its own Config.

    `complete` also writes the defaults into the tree, for which every plugin is imported.
    """
    tree, problems = given.tree, list[str]()
    check = partial(_checked, origins=given.origins, problems=problems, complete=complete)
    for field, info in model.model_fields.items():
        section = tree[field] if isinstance(info.default, PluginSection) else None
        if isinstance(section, dict):
            name = section["name"]
            options = {key: value for key, value in section.items() if key != "name"}
            tree[field] = {"name": name, **check(info.default.kind, name, options, (field,))}
        elif field == "loggers" and isinstance(tree[field], dict):
            tree[field] = {
                name: check("logger", str(name), options, (field, name))
                for name, options in tree[field].items()
            }
    return problems


def _checked(
    kind: str,
    name: str,
    options: Any,
    loc: Loc,
    origins: Mapping[Loc, str],
    problems: list[str],
    complete: bool,
) -> Any:
    """The options with the plugin's defaults filled in; what is wrong goes to `problems`."""
    if not isinstance(options, dict):
        return options
    try:
        if not options and not complete:
            describe(kind, name)
            return options
        plugin_config = find(kind, name).Config
        return plugin_config.model_validate(options).model_dump(mode="json")
    except PluginError as error:
        problems.append(f"{place_of((*loc, 'name'), origins)}{dotted(loc)}: {error}")
    except ValidationError as error:
        problems += problems_of(plugin_config, error, origins, loc)
    return options
