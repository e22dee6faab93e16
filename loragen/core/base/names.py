"""The names of base models: the demo's, a directory, a GGUF file, or a hub id."""

from importlib.resources import files
from typing import Literal

from loragen.core.config import DEMO
from loragen.core.errors import UsageError
from loragen.core.files import user_path

GGUF = ".gguf"
BaseDtype = Literal["", "float32", "bfloat16", "float64"]
"""The dtype in which a frozen base computes; empty if it is not known or none was loaded."""


def resolve_base(name: str) -> str:
    """Returns the path of the shipped demo base, of a directory or of a GGUF file, or a hub id.

    Raises UsageError for a missing path, which transformers would take for a hub id.
    """
    if name == DEMO:
        return str(files("loragen").joinpath("demo", "base"))
    path = user_path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            found = next(iter(sorted(path.glob(f"*{GGUF}"))), None)
            hint = f"; for its GGUF file give {found}" if found else ""
            raise UsageError(f"base model {name}: the directory has no config.json{hint}")
        return str(path)
    if path.is_file() and is_gguf(name):
        return str(path)
    if path.is_file():
        raise UsageError(f"base model {name}: neither a directory nor a GGUF file (*{GGUF})")
    if is_path(name):
        raise UsageError(f"base model {name}: no such {'file' if is_gguf(name) else 'directory'}")
    return name


def absolute_base(name: str) -> str:
    """Returns the absolute path of a directory or a GGUF file; other names as they are."""
    path = user_path(name)
    return str(path.absolute()) if name != DEMO and path.exists() else name


def is_gguf(name: str) -> bool:
    """Returns whether a base is given as a GGUF file."""
    return name.lower().endswith(GGUF)


def is_path(name: str) -> bool:
    """Returns whether a model's name can only be a path, not a hub id."""
    rooted = user_path(name).is_absolute() or name.startswith((".", "~"))
    return rooted or "\\" in name or name.count("/") > 1 or is_gguf(name)


def hub_id(name: str) -> str | None:
    """Returns the name if it is an id that the hub accepts and no path of this machine; `demo` and
    everything else are None."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # imported there

    if name == DEMO or is_path(name) or user_path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name
