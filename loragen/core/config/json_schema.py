"""The JSON schema of a command's configuration, with the options of the installed plugins."""

import logging
from typing import Any, Literal, Union

from pydantic import BaseModel, ConfigDict, create_model

from loragen.core.config.commands import MODELS
from loragen.core.config.sections import PluginSection
from loragen.core.errors import PluginError
from loragen.core.plugins import find, names

log = logging.getLogger(__name__)


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
