"""Checkpoint files: written atomically, and read without running code from them."""

import json
import logging
import pickle
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from loragen.core.adapter import CONFIG_FILE, TORCH_WEIGHTS_FILE, WEIGHTS_FILE, weights_in
from loragen.core.adapter.checks import changes_nothing, check_config, check_finite
from loragen.core.adapter.files import (
    Adapter,
    checked,
    read_adapter,
    read_config,
    read_safetensors,
)
from loragen.core.contents import SNIFFED, nature
from loragen.core.errors import DataError, LoragenError, UsageError, listing, one_line
from loragen.core.files import written_atomically
from loragen.core.run.directory import (
    MANIFEST,
    LoraManifest,
    checkpoint_step,
    find_checkpoints,
    read_manifest,
    run_directory_of,
)

log = logging.getLogger(__name__)

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
    and that of any other .ckpt, .pt or .safetensors file with the configuration stored in it, as
    `gen infer` does, else the `config` given. Its tensors are on the CPU.

    Raises UsageError for a missing path; DataError for a file that does not load, or is no LoRA
    adapter.
    """
    directory = path.parent if path.name in (WEIGHTS_FILE, TORCH_WEIGHTS_FILE) else path
    if path.is_dir() or (directory / CONFIG_FILE).is_file():
        weights = weights_in(directory)
        if weights is None or weights.name == WEIGHTS_FILE:
            return read_adapter(directory)
        return checked(read_config(directory), load_weights_only(weights), weights)
    if not path.is_file():
        raise UsageError(f"{path}: no such checkpoint")
    metadata: Mapping[str, str] = {}
    if path.suffix == ".safetensors":
        state, metadata = read_safetensors(path)
        try:
            own = json.loads(metadata.get("adapter_config", "null"))
        except ValueError as error:
            raise DataError(f"{path}: adapter_config in its metadata: not JSON: {error}") from None
    else:
        document = load_weights_only(path)
        state, own = document.get("state_dict", document), document.get("adapter_config")
    if own is not None:
        check_config(own, f"{path}: adapter_config")
    elif config:
        check_config(config, f"{path}: the configuration of its run")
    if not isinstance(state, Mapping):
        raise DataError(f"{path}: expected tensors by name, found {type(state).__name__}")
    lora = {key: v for key, v in state.items() if "lora_" in key and isinstance(v, torch.Tensor)}
    return checked(own or config or {}, lora, path, metadata)


def read_checkpointed_adapter(path: Path) -> Adapter:
    """Returns the adapter of a PEFT directory, of a run, of one of its checkpoints, or of a file
    that `gen infer` has written; that of an unfinished run is its last checkpoint.

    Raises UsageError if there is none, DataError for NaN or infinity, otherwise as `load_adapter`.
    """
    adapter = _adapter_at(path)
    check_finite(adapter.tensors, path)
    if changes_nothing(adapter.config, adapter.tensors):
        log.warning("%s: the adapter changes nothing: its B A is zero, as before a training", path)
    return adapter


def _adapter_at(path: Path) -> Adapter:
    if not path.exists():
        raise UsageError(f"{path}: no such adapter or checkpoint")
    for directory in (path, path / "adapter"):
        if weights_in(directory):
            return load_adapter(directory)
    if path.is_file() and (adapter := load_adapter(path)).config:
        return adapter
    try:
        run = run_directory_of(path)
    except UsageError as error:
        raise UsageError(f"{error}{instead(path)}") from None
    manifest = read_manifest(run, LoraManifest)
    file = find_checkpoints(path)[-1] if path.is_dir() else path
    adapter = load_adapter(file, manifest.adapter_config)
    return replace(
        adapter,
        chat_template_kwargs=manifest.chat_template_kwargs,
        lineage=manifest.lineage(checkpoint_step(file), run.name),
    )


def instead(path: Path) -> str:
    """Returns what to name in place of a path where there is no adapter; empty if that is not
    known, and for a folder of runs, of which `run_directory_of` says so."""
    if path.is_file():
        return (
            f", and the file holds no configuration; name the directory with its {CONFIG_FILE}, or "
            f"make one: loragen lora export {path} --alpha N --base-model NAME --output DIR"
        )
    if any(path.glob(f"*/{MANIFEST}")):
        return ""
    if inside := sorted(file.parent.name for file in path.glob(f"*/{CONFIG_FILE}")):
        return f"; name one of those in it: {listing(inside, 3)}"
    whole = (path / "config.json").is_file()
    return "; it is a whole model: name it as --base-model, with --no-adapter" if whole else ""


def is_run_or_adapter(path: Path) -> bool:
    """Returns whether `path` is an adapter, a run, a checkpoint of one, or a file with its own
    configuration. A missing path and a folder of runs count, so that `read_checkpointed_adapter`
    reports them."""
    if not path.exists() or any(weights_in(path / d) for d in ("", "adapter")):
        return True
    if any(path.glob(f"*/{MANIFEST}")):
        return True
    with suppress(UsageError):
        run_directory_of(path)
        return True
    with suppress(LoragenError):
        return path.is_file() and bool(load_adapter(path).config)
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
    except Exception as error:  # a damaged pickle may raise anything
        reason = one_line(error).removeprefix("RuntimeError: ")
        raise DataError(f"{path}: not a checkpoint that loads safely: {reason}") from error
    if not isinstance(document, dict):
        raise DataError(f"{path}: expected a dictionary, found {type(document).__name__}")
    for tensor in _tensors_in(document):
        if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
            kind = "meta" if tensor.is_meta else "sparse or quantised"
            raise DataError(f"{path}: a tensor of shape {list(tensor.shape)} in it is {kind}")
    return document


def _tensors_in(document: Any) -> Iterator[Tensor]:
    if isinstance(document, Tensor):
        yield document
    elif isinstance(document, dict | list | tuple):
        for value in document.values() if isinstance(document, dict) else document:
            yield from _tensors_in(value)


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
