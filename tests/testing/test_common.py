import pytest
from pydantic import BaseModel, Field

from loragen.testing._common import validated_options

from .stand_ins import Options


class Plugin:
    Config = Options


class Undescribed:
    class Config(BaseModel, extra="forbid"):
        size: int = 4


class Lenient:
    class Config(BaseModel):
        size: int = Field(4, description="Values.")


class Lossy:
    class Config(BaseModel, extra="forbid"):
        size: int = Field(4, description="Values.", exclude=True)


def test_the_options_are_those_that_were_given():
    assert validated_options(Plugin, {"size": 2}).size == 2
    assert validated_options(Plugin, {}).size == 4


@pytest.mark.parametrize(
    "plugin, message",
    [
        (Undescribed, "Config.size has no description"),
        (Lenient, "accepts unknown options"),
        (Lossy, "does not survive model_dump"),
    ],
)
def test_a_config_is_documented_strict_and_plain_data(plugin, message):
    with pytest.raises(AssertionError, match=message):
        validated_options(plugin, {"size": 2})
