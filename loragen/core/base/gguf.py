"""GGUF files as base models: dequantised by transformers, once, into a Hugging Face directory.

Everything that loads a base then loads that directory: training, merging, tokenizers, dry runs. A
second command does not dequantise again, which takes half a minute even for a small model.
"""

import atexit
import contextlib
import io
import json
import logging
import shutil
import struct
import tempfile
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from platformdirs import user_cache_path

from loragen.core.errors import LoragenError, UsageError, listing, one_line, pip_install
from loragen.core.files import crc32, sha256, write_json, written_atomically
from loragen.core.outputs import is_writable

log = logging.getLogger(__name__)

CHECKSUMS = "checksums.json"
"""The file of a dequantised directory with the CRC-32 of each of the others."""
RECORD = "gguf.json"
"""The file of a dequantised directory that says where it comes from."""
LIBRARY_ERRORS = (OSError, ValueError, LookupError, RuntimeError, TypeError, struct.error)
"""What transformers and gguf raise for files that are damaged or not supported."""
WITHOUT_CACHE = "the file is dequantised for this command alone; XDG_CACHE_HOME names another place"
METADATA = ("architecture", "name", "organization", "license")
OWN_REPOSITORY = ("repo_url", "source.repo_url", "source.url", "source.huggingface.repository")
"""Keys below `general.` that name the model itself; `base_model.0` is what *it* was tuned from."""


def dequantized(file: Path) -> Path:
    """Returns a Hugging Face directory in the user's cache with the model, in float32, and the
    tokenizer of a GGUF file; writes it if it is not there.

    Its name has the hash of the file and the version of transformers in it, and it may be deleted
    at any time. Of several processes, one writes it; where the cache cannot be written, each has a
    temporary one. Raises UsageError if the package gguf is missing, LoragenError if the file is no
    GGUF file or of a kind that transformers cannot read.
    """
    directory = _directory(file)
    if directory.is_dir() and not _damaged(directory):
        return directory
    if not is_writable(directory.parent, WITHOUT_CACHE):
        return _dequantized_for_this_process(file)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(directory.parent / f".{directory.name}.lock"):
        if directory.is_dir() and (damaged := _damaged(directory)):
            log.warning("%s: damaged; it is written again", directory / damaged)
            shutil.rmtree(directory)
        if not directory.is_dir():
            size = file.stat().st_size / 1e6
            log.info("dequantising %s (%.0f MB), once, into %s", file, size, directory)
            with written_atomically(directory) as temporary:
                write_dequantized(file, temporary)
                checksums = {one.name: crc32(one) for one in temporary.iterdir()}
                write_json(temporary / CHECKSUMS, checksums)
    return directory


@cache
def _dequantized_for_this_process(file: Path) -> Path:
    holder = tempfile.TemporaryDirectory(prefix="loragen-gguf-", ignore_cleanup_errors=True)
    atexit.register(holder.cleanup)
    log.info("dequantising %s, into %s", file, holder.name)
    write_dequantized(file, Path(holder.name))
    return Path(holder.name)


def write_dequantized(file: Path, output: Path) -> None:
    """Writes the model of a GGUF file, in float32, and its tokenizer as a Hugging Face directory.

    Float32 holds every dequantised value exactly. Raises as `dequantized` does.
    """
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise LoragenError(f"base model {file}: not a GGUF file")
    if find_spec("gguf") is None:
        raise UsageError(f"base model {file}: GGUF files need gguf: {pip_install('gguf')}")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output.mkdir(parents=True, exist_ok=True)
    # An absolute path beside an empty directory: other files beside the GGUF file do not count.
    source: dict[str, Any] = {
        "pretrained_model_name_or_path": str(output.absolute()),
        "gguf_file": str(file.absolute()),
        "trust_remote_code": False,
    }
    try:
        # The caller may be on the meta device. The progress bar is not one that transformers' own
        # switch turns off.
        with torch.device("cpu"), contextlib.redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(**source)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                **source, dtype=torch.float32, output_loading_info=True
            )
            record = _record(file)
    except LIBRARY_ERRORS as error:
        raise LoragenError(f"base model {file} does not load: {one_line(error)}") from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):  # transformers would leave random weights there
        raise LoragenError(
            f"base model {file}: {len(missing)} tensors are missing: {listing(missing, 2)}; the "
            "parts of a split file have to be merged first (llama-gguf-split --merge)"
        )
    # Else save_pretrained would refuse: the weights are plain now.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    write_json(output / RECORD, record)


def _damaged(directory: Path) -> str | None:
    """Returns the name of a file that is not as it was written, else None."""
    stats = [(file.name, file.stat()) for file in sorted(directory.iterdir())]
    return _damaged_of(directory, *((name, s.st_size, s.st_mtime_ns) for name, s in stats))


@cache
def _damaged_of(directory: Path, *_: tuple[str, int, int]) -> str | None:
    """Reads the files, at 2 GB/s: once per process, unless sizes or times (the `_`) change."""
    try:
        checksums: dict[str, str] = json.loads((directory / CHECKSUMS).read_bytes())
    except OSError:
        return None  # an older loragen has written it
    except ValueError:
        return CHECKSUMS
    files = {name: directory / name for name in checksums}
    wrong = (n for n, one in files.items() if not one.is_file() or crc32(one) != checksums[n])
    return next(wrong, None)


def read_record(file: Path) -> dict[str, str]:
    """Returns what the metadata of a GGUF file say of its model: `file`, `sha256`, and where
    present `name`, `organization`, `license`, `repository` (the model itself) and `base_model` (the
    model that it was tuned from). Empty if the file has not been dequantised on this machine."""
    with contextlib.suppress(OSError, ValueError):
        record: dict[str, str] = json.loads((_directory(file) / RECORD).read_text("utf-8"))
        return record
    return {}


def _record(file: Path) -> dict[str, str]:
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    general = {
        key.removeprefix("general."): str(field.contents())
        for key, field in fields.items()
        if key.startswith("general.")
    }
    record = {"file": file.name, "sha256": sha256(file), "transformers": version("transformers")}
    record |= {key: general[key] for key in METADATA if general.get(key)}
    named = {
        "repository": next((general[key] for key in OWN_REPOSITORY if general.get(key)), ""),
        "base_model": general.get("base_model.0.repo_url") or general.get("base_model.0.name", ""),
    }
    return record | {key: value for key, value in named.items() if value}


def _directory(file: Path) -> Path:
    stat = file.stat()
    digest = _cached_sha256(file.absolute(), stat.st_size, stat.st_mtime_ns)
    name = f"{file.stem}-{digest[:16]}-transformers-{version('transformers')}"
    return user_cache_path("loragen") / "gguf" / name


@cache
def _cached_sha256(file: Path, *_: int) -> str:
    """Hashes a file once per process, unless its size or time of change (the `_`) differ."""
    return sha256(file)
