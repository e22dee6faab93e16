"""Files that are never half-written, and the hashes that name their content.

Whether the Hugging Face hub can be asked: one short look, since its libraries retry for half a
minute and more on a machine without network.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from loragen.core.errors import UsageError

LONGEST_NAME = 120
"""Bytes; file systems take 255, and suffixes, numbers and temporary names come to it."""
RESERVED = re.compile(r"(con|prn|aux|nul|(com|lpt)[\d¹²³])(\..*)?", re.IGNORECASE)
"""Devices of Windows, whatever the ending."""


@contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it once the block has succeeded.

    Write a file or make a directory there; on an error all is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    holder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    new, old = holder / path.name, holder / f"{path.name}.old"
    try:
        yield new
        if path.is_dir():
            path.rename(old)  # a directory cannot be renamed over another
        try:
            new.replace(path)
        except BaseException:
            if old.exists():
                old.rename(path)
            raise
    finally:
        if path.exists() or not old.exists():  # never the only copy
            shutil.rmtree(holder, ignore_errors=True)


def remove_unfinished(directory: Path) -> None:
    """What a process killed inside `written_atomically` has left below `directory`."""
    for holder in [*directory.glob(".*.*"), *directory.glob("*/.*.*")]:
        if holder.is_dir():
            shutil.rmtree(holder, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    with written_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, document: Any) -> None:
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def refuse_existing(path: Path, force: bool, marker: str) -> None:
    """Raises UsageError where `path` exists, unless the user said `--force` and it is an earlier
    output of the same kind: a directory with the file `marker` in it, or an empty one."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not force:
        raise UsageError(f"{path} exists already; choose another place or add --force")
    if not (path / marker).is_file():
        raise UsageError(f"{path} has no {marker}: --force replaces only earlier outputs")


def refuse_file(directory: Path) -> None:
    """Raises UsageError where `directory`, or one above it, is a file."""
    for place in (directory, *directory.parents):
        if place.exists() and not place.is_dir():
            raise UsageError(f"{place} is a file; --output is a directory")


def absent(path: Path, what: str) -> str:
    """That there is no such thing, or that it is another: `d is a directory, not a file`."""
    if not path.exists():
        return f"{path}: no such {what}"
    return f"{path} is a {'directory' if path.is_dir() else 'file'}, not a {what}"


def user_path(text: str) -> Path:
    """With `~` replaced; as it stands where nobody is called that."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def file_name(text: str, otherwise: str = "unnamed") -> str:
    """Of any text, a name that every file system takes: letters, digits, `_`, `.` and `-`."""
    name = re.sub(r"[^\w.-]+", "-", unicodedata.normalize("NFC", text)).strip(".-")
    name = name.encode()[:LONGEST_NAME].decode(errors="ignore").strip(".-")
    return f"_{name}" if RESERVED.fullmatch(name) else name or otherwise


def sha256(path: Path) -> str:
    """The hex digest of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_text(*parts: str) -> str:
    """The hex digest of several texts; their borders count."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sorts `layers.2` before `layers.10`."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]


SECONDS_TO_ANSWER = 10
SILENT = (socket.gaierror, ConnectionError, TimeoutError, HTTPException)
UNREACHABLE = (errno.ENETUNREACH, errno.EHOSTUNREACH)


@cache
def silence() -> str | None:
    """Why the hub cannot be asked, and what to do; None where it answers or is not to be asked."""
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return None
    try:
        urlopen(Request(ENDPOINT, method="HEAD"), timeout=SECONDS_TO_ANSWER).close()
    except ValueError:
        return f"HF_ENDPOINT {ENDPOINT} is no address: it begins with https://"
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, SILENT) or getattr(reason, "errno", None) in UNREACHABLE:
            mirror = "" if os.environ.get("HF_ENDPOINT") else "HF_ENDPOINT names a mirror, "
            return (
                f"{ENDPOINT} does not answer ({reason}); "
                f"{mirror}HF_HUB_OFFLINE=1 reads what was downloaded before"
            )
    return None
