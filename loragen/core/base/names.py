"""The names of base models: the demo's, a directory, or a hub id."""

from importlib.resources import files
from typing import Literal

from loragen.core.config import DEMO
from loragen.core.errors import UsageError
from loragen.core.files import user_path

BaseDtype = Literal["", "float32", "bfloat16", "float64"]
"""The dtype in which a frozen base computes; empty if it is not known or none was loaded."""


def resolve_base(name: str) -> str:
    """Returns the name that transformers loads: the shipped demo base, a directory, or a hub id.

    Raises UsageError for a missing path, which transformers would take for a hub id.
    """
    if name == DEMO:
        return str(files("loragen").joinpath("demo", "base"))
    path = user_path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"base model {name}: the directory has no config.json")
        return str(path)
    if is_path(name):
        raise UsageError(f"base model {name}: no such directory")
    return name


def is_path(name: str) -> bool:
    """Returns whether a model's name can only be that of a directory, not a hub id."""
    rooted = user_path(name).is_absolute() or name.startswith((".", "~"))
    return rooted or "\\" in name or name.count("/") > 1
