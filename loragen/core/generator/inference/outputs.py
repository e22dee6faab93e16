"""Where a generated adapter may be written; checked without torch, before anything is loaded."""

from pathlib import Path

from loragen.core.errors import UsageError
from loragen.core.files import refuse_existing, refuse_file
from loragen.core.runs import ADAPTER_CONFIG

FILE_SUFFIXES = (".safetensors", ".pt")
OTHER_WEIGHTS = (".bin", ".ckpt", ".gguf", ".npz", ".pth")


def default_output() -> Path:
    """`generated/adapter-001`, or the first number that is free."""
    number = 1
    while (path := Path("generated") / f"adapter-{number:03d}").exists():
        number += 1
    return path


def place_of(output: Path, name: str, suffix: str) -> Path:
    """Of one adapter among several, by its name; the only one (no name) is the output itself.

    Raises UsageError where several would go into one file.
    """
    if not name:
        return output
    if output.suffix in FILE_SUFFIXES:
        raise UsageError(
            f"{output}: --per writes a directory; for files in it, add --format {output.suffix[1:]}"
        )
    return output / f"{name}{suffix}"


def check_output(path: Path, overwrite: bool, marker: str = ADAPTER_CONFIG) -> None:
    """Raises UsageError where something is at `path` that must not be replaced.

    With `overwrite`, a weights file may be replaced, and a directory that has `marker` in it.
    """
    refuse_file(path.parent)
    if path.suffix in OTHER_WEIGHTS:
        raise UsageError(f"{path}: write a directory (PEFT), or a .safetensors or .pt file")
    if path.suffix not in FILE_SUFFIXES:
        refuse_existing(path, overwrite, marker)
    elif path.is_dir():
        raise UsageError(f"{path} is a directory; as a {path.suffix} it would be a file")
    elif path.exists() and not overwrite:
        raise UsageError(
            f"{path} exists already; choose another place or add --force (overwrite=True)"
        )
