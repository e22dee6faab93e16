"""The default configuration as a YAML file that explains itself."""

from collections.abc import Iterator
from typing import Any

import yaml
from pydantic import BaseModel

from loragen.core.config.load import load
from loragen.core.config.schema import GenTrainConfig, LoraTrainConfig, PluginSection
from loragen.core.plugins import find

MODELS: dict[str, type[BaseModel]] = {"lora": LoraTrainConfig, "gen": GenTrainConfig}


def document(command: str) -> str:
    """Every default of `loragen <command> train`, with its meaning as a comment."""
    config = load(MODELS[command], environment={})
    head = f"# The defaults of `loragen {command} train`. Keep the lines that you change.\n"
    return head + "\n".join(_lines(config, "")) + "\n"


def _lines(section: BaseModel, indent: str) -> Iterator[str]:
    described: dict[str, Any] = dict(type(section).model_fields)
    if isinstance(section, PluginSection):
        described |= find(section.kind, section.name).Config.model_fields
    for key, value in section:
        meaning = getattr(described.get(key), "description", None)
        comment = f"  # {meaning}" if meaning else ""
        if isinstance(value, BaseModel):
            yield f"{indent}{key}:{comment}"
            yield from _lines(value, indent + "  ")
        else:
            yield f"{indent}{key}: {_inline(value)}{comment}"


def _inline(value: Any) -> str:
    return (
        yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
    )
