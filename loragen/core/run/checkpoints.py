"""Checkpoint files: written atomically, and read without running code from them."""

import pickle
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from loragen.core.adapter import CONFIG_FILE, WEIGHTS_FILE
from loragen.core.adapter.files import Adapter, file_keys, read_adapter, read_safetensors
from loragen.core.errors import DataError, UsageError, one_line
from loragen.core.files import SNIFFED, nature, written_atomically
from loragen.core.run.directory import (
    LoraManifest,
    find_checkpoints,
    read_manifest,
    run_directory_of,
)

CHUNK = 2**20
DAMAGED = (zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError, zlib.error)
"""What zipfile raises for an archive whose own records are damaged."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes Lightning's own format, under a temporary name until the file is complete."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        with written_atomically(Path(path)) as temporary:
            super().save_checkpoint(checkpoint, temporary, storage_options)


def load_adapter(path: Path, config: Mapping[str, Any] | None = None) -> Adapter:
    """Returns the adapter of a PEFT directory, or of its weights file, with its own configuration,
    and that of any other .ckpt, .pt or .safetensors file with the `config` given. Its tensors are
    on the CPU.

    Raises UsageError for a missing path; DataError for a file that does not load or holds no LoRA
    tensors.
    """
    directory = path.parent if path.name == WEIGHTS_FILE else path
    if path.is_dir() or (directory / CONFIG_FILE).is_file():
        return read_adapter(directory)
    if not path.is_file():
        raise UsageError(f"{path}: no such checkpoint")
    if path.suffix == ".safetensors":
        tensors = file_keys(read_safetensors(path))
    else:
        document = load_weights_only(path)
        tensors = file_keys(document.get("state_dict", document))
    if not tensors:
        raise DataError(f"{path}: no LoRA tensors in it (no key has 'lora_')")
    return Adapter(dict(config or {}), tensors)


def read_checkpointed_adapter(path: Path) -> Adapter:
    """Returns the adapter of a PEFT directory, of a run, or of one of its checkpoints; that of an
    unfinished run is its last checkpoint.

    Raises UsageError if there is none, otherwise as `load_adapter`.
    """
    for directory in (path, path / "adapter"):
        if (directory / WEIGHTS_FILE).is_file():
            return read_adapter(directory)
    if not path.exists():
        raise UsageError(f"{path}: no such adapter or checkpoint")
    manifest = read_manifest(run_directory_of(path), LoraManifest)
    file = find_checkpoints(path)[-1] if path.is_dir() else path
    return load_adapter(file, manifest.adapter_config)


def is_run_or_adapter(path: Path) -> bool:
    """Returns whether `path` is an adapter, a run or a checkpoint of one. A missing path counts,
    so that `read_checkpointed_adapter` reports it."""
    if not path.exists() or any((path / d / WEIGHTS_FILE).is_file() for d in ("", "adapter")):
        return True
    with suppress(UsageError):
        run_directory_of(path)
        return True
    return False


def load_weights_only(path: Path) -> dict[str, Any]:
    """Returns a dictionary that `torch.save` has written, memory-mapped, without running code.

    Raises DataError for anything else, which names what the file is, and for a file that is not as
    it was written.
    """
    stat = path.stat()
    if fault := _fault(path, stat.st_size, stat.st_mtime_ns):
        raise DataError(f"{path}: {fault}")
    try:
        document = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path}: not a checkpoint that loads safely: it holds more than tensors and plain data"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: not a checkpoint that loads safely: {reason}") from error
    if not isinstance(document, dict):
        raise DataError(f"{path}: expected a dictionary, found {type(document).__name__}")
    return document


@lru_cache(maxsize=4096)
def _fault(path: Path, *_: int) -> str | None:
    """Returns why a file is not one that `torch.save` has written completely, else None; computed
    once per process, unless its size or time of change (the `_`) differ.

    `torch.save` writes a ZIP archive, which has a CRC-32 of each tensor. `torch.load` does not look
    at them. Reading a file that is in the page cache takes 0.8 s per GB.
    """
    with path.open("rb") as file:
        head = file.read(SNIFFED)
    if not head:
        return "it is empty"
    damaged = []
    try:
        if not zipfile.is_zipfile(path):  # the format of torch.save since 1.6
            if head.startswith(b"PK\x03\x04"):
                return "truncated: the end of the file is missing"
            what = nature(head)
            also = f"; it is {what}" if what else ""
            return f"not a checkpoint that loads safely: torch.save did not write it{also}"
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            for entry in entries:
                try:
                    with archive.open(entry) as stream:
                        while stream.read(CHUNK):
                            pass
                except zipfile.BadZipFile:
                    damaged.append(entry.filename)
    except DAMAGED as error:
        return f"damaged: {one_line(error)}; restore it, or make it again"
    if damaged and len(damaged) < len(entries):  # none matches if torch was told not to compute any
        return (
            f"damaged: {damaged[0].partition('/')[2]} is not what was written (checksum); restore "
            "it, or make it again"
        )
    return None
