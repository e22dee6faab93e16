# ruff: noqa: ARG005  # a stand-in ignores what the real one would use

import pytest
import torch
from pydantic import BaseModel, Field

from loragen.core.protocols import Rate
from loragen.testing import check_schedule

from .stand_ins import Options, variant


class Schedule:
    Config = Options

    def __init__(self, config):
        self.calls = 0

    def __call__(self, step, total_steps):
        self.calls += 1
        return self.rate(step, total_steps)

    def rate(self, step, total_steps):
        return Rate(1e-4, 1)


def test_a_correct_schedule_passes():
    check_schedule(Schedule, size=2)


@pytest.mark.parametrize(
    "attributes, message",
    [
        ({"rate": lambda self, step, total: Rate(0.0, 1)}, "gives 0.0"),
        ({"rate": lambda self, step, total: Rate(float("nan"), 1)}, "gives nan"),
        ({"rate": lambda self, step, total: Rate(1e-4, 0)}, "stages count from 1"),
        ({"rate": lambda self, step, total: Rate(1e-4, 2 - step // total)}, "goes back from"),
        ({"rate": lambda self, step, total: Rate(torch.tensor(1.0), 1)}, "plain numbers"),
        (
            {"rate": lambda self, step, total: Rate(1.0 / self.calls, 1)},
            "differs when called again",
        ),
    ],
)
def test_a_broken_contract_is_named(attributes, message):
    with pytest.raises(AssertionError, match=message):
        check_schedule(variant(Schedule, **attributes))


class Undescribed(BaseModel, extra="forbid"):
    size: int = 4


class Lenient(BaseModel):
    size: int = Field(4, description="Values.")


class Lossy(BaseModel, extra="forbid"):
    size: int = Field(4, description="Values.", exclude=True)


@pytest.mark.parametrize(
    "config, message",
    [
        (Undescribed, "Config.size has no description"),
        (Lenient, "accepts unknown options"),
        (Lossy, "does not survive model_dump"),
    ],
)
def test_a_config_is_documented_strict_and_plain_data(config, message):
    """Every check looks at the Config."""
    with pytest.raises(AssertionError, match=message):
        check_schedule(variant(Schedule, Config=config), size=2)
