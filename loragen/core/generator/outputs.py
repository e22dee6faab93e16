"""Where a generated adapter may be written; checked without torch, before anything is loaded."""

from pathlib import Path

from loragen.core.errors import UsageError
from loragen.core.files import refuse_existing, refuse_file
from loragen.core.runs import ADAPTER_CONFIG

FILE_SUFFIXES = (".safetensors", ".pt")
OTHER_WEIGHTS = (".bin", ".ckpt", ".gguf", ".npz", ".pth")


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
        raise UsageError(f"{path} exists already; choose another place or add --force")
