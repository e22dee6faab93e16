"""The configuration of each command: one model, read from YAML, environment, `--set`, flags."""

from loragen.core.config.load import Override, dump, load
from loragen.core.config.schema import DEMO, GenTrainConfig, LoraTrainConfig, PluginSection

__all__ = [
    "DEMO",
    "GenTrainConfig",
    "LoraTrainConfig",
    "Override",
    "PluginSection",
    "dump",
    "load",
]
