"""Configuration: one model per command, read from YAML, environment, `--set` and flags."""

from loragen.core.config.document import document
from loragen.core.config.load import Override, dump, load
from loragen.core.config.schema import GenTrainConfig, LoraTrainConfig, PluginSection

__all__ = [
    "GenTrainConfig",
    "LoraTrainConfig",
    "Override",
    "PluginSection",
    "document",
    "dump",
    "load",
]
