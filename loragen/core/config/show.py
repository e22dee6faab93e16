"""Views of a configuration: settings with origins, commented defaults, JSON schema, differences."""

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union

from pydantic import BaseModel, ConfigDict, create_model

from loragen.core.config.load import ENV_PREFIX, Layers, load, merge_layers, validate_layers
from loragen.core.config.schema import (
    AUTO,
    MODELS,
    NAMELESS,
    GenTrainConfig,
    NoOptions,
    PluginSection,
)
from loragen.core.config.yaml_file import Loc, commented, dotted, leaves
from loragen.core.errors import PluginError, listing
from loragen.core.plugins import find, names

log = logging.getLogger(__name__)

HARDWARE = ("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy")
"""Settings that change a result by rounding only."""


@dataclass(frozen=True)
class Setting:
    key: str
    value: Any
    origin: str
    """`default`, `file:line:column`, `LORAGEN_...`, `--set`."""


def resolved_settings(
    command: str,
    file: Path | Layers | None = None,
    settings: Iterable[str] = (),
    environment: Mapping[str, str] | None = None,
) -> list[Setting]:
    """Returns every value of the configuration as `load` returns it, with its origin.

    Raises as `load` does.
    """
    model = MODELS[command]
    layers = merge_layers(model, file, settings, environment=environment)
    found = []
    for keys, value in leaves(validate_layers(model, layers).model_dump(mode="json")):
        own = [layers.origins[keys]] if keys in layers.origins else []
        items = [  # another layer may have replaced an item of a list that the file gave
            origin
            for at, origin in layers.origins.items()
            if at[: len(keys)] == keys and origin.startswith(("--", ENV_PREFIX))
        ]
        origin = ", ".join(dict.fromkeys(own + items)) or "default"
        found.append(Setting(dotted(keys), value, origin))
    return found


def differences(
    then: BaseModel, now: BaseModel, free: Collection[str], whose: str = "the run"
) -> list[str]:
    """Returns `key is x, the run has y` for every setting that differs and is not `free` to.

    `whose` are the old settings. `free` names sections and keys, `loggers` or `data.workers`.
    """
    old, new = (
        {
            dotted(keys): value
            for keys, value in leaves(config.model_dump(mode="json"))
            if not {str(keys[0]), dotted(keys)} & set(free)
        }
        for config in (then, now)
    )
    return [
        f"{key} is {new.get(key)}, {whose} has {old.get(key)}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    ]


def other_hardware(then: BaseModel, now: BaseModel) -> bool:
    """Returns whether the two compute on different devices."""
    old, new = (
        [value for keys, value in leaves(config.model_dump()) if dotted(keys) in HARDWARE]
        for config in (then, now)
    )
    return old != new


def commented_defaults(command: str) -> str:
    """Returns every default of `loragen <command> train`, with its meaning as a comment."""
    config = load(MODELS[command], environment={})

    def meaning(keys: Loc) -> str:
        section: Any = config
        for depth, key in enumerate(keys):
            if isinstance(section, PluginSection):
                return _plugin_meaning(str(keys[depth - 1]), section.name, keys[depth:])
            if isinstance(section, Mapping):  # the loggers, by name
                return _plugin_meaning("logger", str(key), keys[depth + 1 :])
            description = type(section).model_fields[str(key)].description or ""
            section = getattr(section, str(key))
        return description

    head = f"# The defaults of `loragen {command} train`. Keep the lines that you change.\n"
    return head + commented(config.model_dump(mode="json"), meaning)


def _plugin_meaning(kind: str, name: str, keys: Loc) -> str:
    if name == AUTO:
        return str(GenTrainConfig.model_fields[kind].description) if keys else ""
    fields = find(kind, name).Config.model_fields
    if not keys:
        return "" if fields else "It has no options."
    if keys == ("name",):
        return f"Which {kind}; installed: {listing(names(kind))}."
    return str(fields[str(keys[0])].description or "") if keys[0] in fields else ""


def json_schema(command: str) -> dict[str, Any]:
    """Returns a schema for editors that complete and check YAML.

    A plugin that does not load is left out.
    """
    model = MODELS[command]
    fields: dict[str, Any] = {}
    for key, info in model.model_fields.items():
        default = info.default
        if isinstance(default, PluginSection):  # without a name, the default plugin's
            sections: list[Any] = []
            nameless = NAMELESS.get(default.name, default.name)
            configs = _plugin_configs(key)
            if default.name == AUTO:
                configs[AUTO] = NoOptions
            for name, config in configs.items():
                named: Any = (Literal[name], name if name == nameless else ...)
                section = create_model(f"{key}_{name}", __base__=config, name=named)
                sections.append(section)
            union: Any = Union[tuple(sections)]  # noqa: UP007  # `|` cannot join a tuple
            fields[key] = (union, {"name": default.name})
    loggers: dict[str, Any] = {
        name: (config | None, None) for name, config in _plugin_configs("logger").items()
    }
    all_loggers = create_model("Loggers", __config__=ConfigDict(extra="forbid"), **loggers)
    fields["loggers"] = (all_loggers, model.model_fields["loggers"])
    complete: type[BaseModel] = create_model(model.__name__, __base__=model, **fields)
    dialect = "https://json-schema.org/draft/2020-12/schema"
    schema = complete.model_json_schema()
    if command == "gen":  # any sequence of objectives is valid, so they are no enumeration
        objective = schema["$defs"]["GenTrainingSection"]["properties"]["objective"]
        objective["examples"] = ["auto", *names("objective"), "reconstruction-then-behaviour"]
    return {"$schema": dialect, **schema}


def _plugin_configs(kind: str) -> dict[str, type[BaseModel]]:
    configs = {}
    for name in names(kind):
        try:
            configs[name] = find(kind, name).Config
        except PluginError as error:
            log.warning("%s", error)
    return configs
