"""LoRA adapters: their files, their tensors as tokens, the algebra of ΔW, merging and export."""

import json
from pathlib import Path
from typing import Any

from loragen.core.files import refuse_existing, write_json

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
"""The two files of a PEFT adapter directory."""
KEY_PREFIX = "base_model.model."
"""The prefix of PEFT's file keys; a module's path in the base model follows it."""
MERGED_MARKER = "loragen_export.json"
"""The file that only a merged model written by loragen has."""
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, "README.md")
"""The files of an adapter directory that loragen has written."""


def refuse_existing_adapter(path: Path, force: bool, merged: bool = False) -> None:
    """Raises UsageError if a directory with an adapter, or with a merged model, must not be
    written at `path`: it exists, and `force` is not given or would delete a file that loragen has
    not written."""
    if not merged:
        refuse_existing(path, force, CONFIG_FILE, ADAPTER_FILES)
        return
    try:
        written = json.loads((path / MERGED_MARKER).read_bytes())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        written = []
    refuse_existing(path, force, MERGED_MARKER, written)


def write_merged_marker(directory: Path, document: dict[str, Any]) -> None:
    """Writes `MERGED_MARKER` into a directory that is otherwise complete, with the names of its
    files: the tokenizer decides them."""
    files = sorted({MERGED_MARKER, *(file.name for file in directory.iterdir())})
    write_json(directory / MERGED_MARKER, document | {"files": files})
