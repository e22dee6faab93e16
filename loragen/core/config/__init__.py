"""Configuration: one model per command, read from YAML, environment, `--set` and flags."""

from loragen.core.config.document import document
from loragen.core.config.gen_schema import GenTrainConfig
from loragen.core.config.load import Override, dump, load
from loragen.core.config.lora_schema import LoraTrainConfig
from loragen.core.config.sections import DEMO, PluginSection

__all__ = [
    "DEMO",
    "GenTrainConfig",
    "LoraTrainConfig",
    "Override",
    "PluginSection",
    "document",
    "dump",
    "load",
]
