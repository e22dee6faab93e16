"""Where each value of a configuration comes from.

Configurations as YAML files that explain themselves.

The JSON schema of a command's configuration, with the options of the installed plugins.
"""

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union

from pydantic import BaseModel, ConfigDict, create_model

from loragen.core.config.load import ENV_PREFIX, Given, layered, load, validate_layers
from loragen.core.config.schema import MODELS, PluginSection
from loragen.core.config.yaml_file import Loc, commented, dotted
from loragen.core.errors import PluginError, listing
from loragen.core.plugins import find, names

log = logging.getLogger(__name__)

DEFAULT = "default"


@dataclass(frozen=True)
class Setting:
    key: str
    value: Any
    origin: str
    """`default`, `file:line:column`, `LORAGEN_...`, `--set`."""


def settings_of(
    command: str,
    file: Path | Given | None = None,
    settings: Iterable[str] = (),
    environment: Mapping[str, str] | None = None,
) -> list[Setting]:
    """Every value of the configuration that `load` makes of the same. Raises as `load` does."""
    model = MODELS[command]
    given = layered(model, file, settings, environment=environment)
    config = validate_layers(model, given).model_dump(mode="json")
    return [
        Setting(dotted(keys), value, _origin(keys, given.origins))
        for keys, value in _leaves(config, ())
    ]


def _leaves(tree: Mapping[str, Any], at: Loc) -> Iterator[tuple[Loc, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*at, key))
        else:
            yield (*at, key), value


def _origin(keys: Loc, origins: Mapping[Loc, str]) -> str:
    """An item of a list that a file gave may be another layer's: `sources` of both."""
    own = [origins[keys]] if keys in origins else []
    items = [
        origin
        for place, origin in origins.items()
        if place[: len(keys)] == keys and origin.startswith(("--", ENV_PREFIX))
    ]
    return ", ".join(dict.fromkeys(own + items)) or DEFAULT


def commented_defaults(command: str) -> str:
    """Every default of `loragen <command> train`, with its meaning as a comment."""
    model = MODELS[command]
    config = load(model, environment={})
    head = f"# The defaults of `loragen {command} train`. Keep the lines that you change.\n"
    tree = config.model_dump(mode="json")
    return head + commented(tree, lambda keys: _meaning(config, keys))


def _meaning(config: BaseModel, keys: Loc) -> str:
    """What the setting at a path means, as its field says; "" for a section without a word."""
    section: Any = config
    for depth, key in enumerate(keys):
        if isinstance(section, PluginSection):
            return _of_plugin(section.kind, section.name, keys[depth:])
        if isinstance(section, Mapping):  # the loggers, by name
            return _of_plugin("logger", str(key), keys[depth + 1 :])
        info = type(section).model_fields[str(key)]
        section = getattr(section, str(key))
    return info.description or ""


def _of_plugin(kind: str, name: str, keys: Loc) -> str:
    fields = find(kind, name).Config.model_fields
    if not keys:
        return "" if fields else "It has no options."
    if keys == ("name",):
        return f"Which {kind}; installed: {listing(names(kind))}."
    return str(fields[str(keys[0])].description or "") if keys[0] in fields else ""


def json_schema(command: str) -> dict[str, Any]:
    """For editors that complete and check YAML. A plugin that does not load is left out."""
    model = MODELS[command]
    fields: dict[str, Any] = {}
    for key, info in model.model_fields.items():
        if isinstance(info.default, PluginSection):
            section: Any = _section(info.default)
            fields[key] = (section, {"name": info.default.name})
        elif key == "loggers":
            fields[key] = (_loggers(), info)
    complete: type[BaseModel] = create_model(model.__name__, __base__=model, **fields)
    dialect = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": dialect, **complete.model_json_schema()}


def _section(default: PluginSection) -> Any:
    """`name` and the options of one plugin, or of another; without a name it is the default."""
    sections: list[Any] = []
    for name, config in _configs(default.kind).items():
        named: Any = (Literal[name], name if name == default.name else ...)
        sections.append(create_model(f"{default.kind}_{name}", __base__=config, name=named))
    return Union[tuple(sections)]  # noqa: UP007  # of as many as are installed


def _loggers() -> type[BaseModel]:
    options: dict[str, Any] = {
        name: (config | None, None) for name, config in _configs("logger").items()
    }
    return create_model("Loggers", __config__=ConfigDict(extra="forbid"), **options)


def _configs(kind: str) -> dict[str, type[BaseModel]]:
    configs = {}
    for name in names(kind):
        try:
            configs[name] = find(kind, name).Config
        except PluginError as error:
            log.warning("%s", error)
    return configs


HARDWARE = (
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
)
"""Decide the result up to rounding only."""


def differences(then: BaseModel, now: BaseModel, free: Collection[str]) -> list[str]:
    """`key is x, the run has y` for every setting that is not `free` to differ.

    `free` names sections and keys, `loggers` or `data.workers`.
    """
    old, new = _flat(then, free), _flat(now, free)
    return [
        f"{key} is {new.get(key)}, the run has {old.get(key)}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    ]


def other_hardware(then: BaseModel, now: BaseModel) -> bool:
    """Whether the two compute on different devices."""
    one, other = (config.model_dump(mode="json")["trainer"] for config in (then, now))
    keys = [key.partition(".")[2] for key in HARDWARE]
    return any(one[key] != other[key] for key in keys)


def _flat(config: BaseModel, free: Collection[str]) -> dict[str, Any]:
    """`{"training.batch_size": 32, ...}`"""
    flat: dict[str, Any] = {}
    for section, value in config.model_dump(mode="json").items():
        keys = value if isinstance(value, dict) else {"": value}
        flat |= {f"{section}.{key}".rstrip("."): item for key, item in keys.items()}
    return {
        key: value
        for key, value in flat.items()
        if key not in free and key.partition(".")[0] not in free
    }
