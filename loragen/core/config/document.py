"""Configurations as YAML files that explain themselves."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from loragen.core.config.commands import MODELS
from loragen.core.config.load import load
from loragen.core.config.sections import PluginSection
from loragen.core.config.yaml_file import Loc, commented
from loragen.core.errors import listing
from loragen.core.plugins import find, names


def document(command: str) -> str:
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
