"""Which configuration belongs to which command."""

from pydantic import BaseModel

from loragen.core.config.gen_schema import GenTrainConfig
from loragen.core.config.lora_schema import LoraTrainConfig

MODELS: dict[str, type[BaseModel]] = {"lora": LoraTrainConfig, "gen": GenTrainConfig}


def command_of(model: type[BaseModel]) -> str:
    """`lora` or `gen`."""
    return next(command for command, known in MODELS.items() if issubclass(model, known))
