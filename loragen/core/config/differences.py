"""Which settings two configurations of one command differ in. Light."""

from collections.abc import Collection
from typing import Any

from pydantic import BaseModel

HARDWARE = (
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
)
"""Decide the result up to rounding only."""


def differences(then: BaseModel, now: BaseModel, free: Collection[str]) -> list[str]:
    """`key is x, the run has y` for every setting that is not `free` to differ.

    `free` names sections and keys, `loggers` or `data.workers`.
    """
    old, new = _flat(then, free), _flat(now, free)
    return [
        f"{key} is {new.get(key)}, the run has {old.get(key)}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    ]


def other_hardware(then: BaseModel, now: BaseModel) -> bool:
    """Whether the two compute on different devices."""
    one, other = (config.model_dump(mode="json")["trainer"] for config in (then, now))
    keys = [key.partition(".")[2] for key in HARDWARE]
    return any(one[key] != other[key] for key in keys)


def _flat(config: BaseModel, free: Collection[str]) -> dict[str, Any]:
    """`{"training.batch_size": 32, ...}`"""
    flat: dict[str, Any] = {}
    for section, value in config.model_dump(mode="json").items():
        keys = value if isinstance(value, dict) else {"": value}
        flat |= {f"{section}.{key}".rstrip("."): item for key, item in keys.items()}
    return {
        key: value
        for key, value in flat.items()
        if key not in free and key.partition(".")[0] not in free
    }
