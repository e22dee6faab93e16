"""LoRA adapters: their files, their tensors as tokens, the algebra of ΔW, merging and export."""

from enum import StrEnum
from pathlib import Path
from typing import Any

from loragen.core.files import write_json
from loragen.core.outputs import (
    Record,
    hashes,
    recorded_in_json,
    recorded_in_text,
    refuse_existing,
)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
"""The two files of a PEFT adapter directory."""
TORCH_WEIGHTS_FILE = "adapter_model.bin"
"""The weights of an adapter that an old PEFT has written."""
KEY_PREFIX = "base_model.model."
"""The prefix of PEFT's file keys; a module's path in the base model follows it."""
MERGED_MARKER = "loragen_export.json"
"""The file that only a merged model written by loragen has."""
CARD = "README.md"
"""The model card, which records the other files at its end."""


class Server(StrEnum):
    """The servers whose rules are known (see `serving`)."""

    vllm = "vllm"
    sglang = "sglang"
    lorax = "lorax"
    llama_cpp = "llama.cpp"


def weights_in(directory: Path) -> Path | None:
    """Returns the file with the weights of a PEFT adapter directory; None for any other."""
    files = [directory / WEIGHTS_FILE]
    if (directory / CONFIG_FILE).is_file():  # other programs have a file of that name, too
        files.append(directory / TORCH_WEIGHTS_FILE)
    return next((file for file in files if file.is_file()), None)


def refuse_existing_adapter(path: Path, force: bool, merged: bool = False) -> None:
    """Raises UsageError if a directory with an adapter, or with a merged model, must not be written
    at `path` (see `outputs.refuse_existing`)."""
    if merged:
        refuse_existing(path, force, merged_record)
    else:
        refuse_existing(path, force, adapter_record, (CONFIG_FILE, WEIGHTS_FILE, CARD))


def adapter_record(directory: Path) -> Record | None:
    """Returns the record of an adapter directory that loragen has written. A configuration without
    weights is no adapter of anybody, and counts as one."""
    if not any(directory.glob("adapter_model.*")):
        return {CONFIG_FILE: None} if (directory / CONFIG_FILE).is_file() else None
    return recorded_in_text(directory, CARD)


def merged_record(directory: Path) -> Record | None:
    """Returns the record of a merged model that loragen has written."""
    return recorded_in_json(directory, MERGED_MARKER)


def write_merged_marker(directory: Path, document: dict[str, Any]) -> None:
    """Writes `MERGED_MARKER`, with the record, into a directory that is otherwise complete."""
    write_json(directory / MERGED_MARKER, document | {"files": hashes(directory)})
