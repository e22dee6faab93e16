"""Atomic writing, checks of paths, names and hashes of files, and one check of the hub."""

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from loragen.core.errors import UsageError, listing

MAX_NAME_BYTES = 120
"""File systems allow 255; this leaves room for suffixes, numbers and temporary names."""
RESERVED = re.compile(r"(con|prn|aux|nul|(com|lpt)[\d¹²³])(\..*)?", re.IGNORECASE)
"""Names of devices on Windows, which no file may have, with any suffix."""
HELD_SECONDS = 2.0 if os.name == "nt" else 0.0
"""How long a renaming is tried again: on Windows it fails while another program, such as a virus
scanner, has the file open."""
HUB_TIMEOUT = 10
"""Seconds to wait for the hub's answer."""


@contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, and renames it to `path` once the block has succeeded.

    The block writes a file or makes a directory there; after an error, everything is as before. A
    process that is killed leaves one of the two versions. A power failure does too if the block has
    synced its file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    holder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    new, old = holder / path.name, holder / f"{path.name}.old"
    try:
        yield new
        if path.is_dir():
            _while_held(path.rename, old)  # a directory cannot be renamed over another
        try:
            _while_held(new.replace, path)
        except BaseException:
            if old.exists():
                old.rename(path)
            raise
    finally:
        if path.exists() or not old.exists():  # keeps the old version if it is the only one
            shutil.rmtree(holder, ignore_errors=True)


def _while_held(rename: Callable[[Path], object], target: Path) -> None:
    """Renames, and tries again for `HELD_SECONDS` as long as another program holds the file."""
    deadline = time.monotonic() + HELD_SECONDS
    while True:
        try:
            rename(target)
        except PermissionError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.05)
        else:
            return


def remove_unfinished(directory: Path) -> None:
    """Removes temporary files that a process killed inside `written_atomically` has left."""
    for holder in [*directory.glob(".*.*"), *directory.glob("*/.*.*")]:
        if holder.is_dir():
            shutil.rmtree(holder, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 with line feeds, atomically, and syncs it with the disk."""
    with written_atomically(path) as temporary, temporary.open("wb") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, document: Any) -> None:
    """Writes a document as indented JSON, atomically."""
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def refuse_existing(
    path: Path, force: bool, marker: str, written: Sequence[str] | None = None
) -> None:
    """Raises UsageError if `path` exists. An empty directory may be replaced; with `force` also
    an earlier output of the same kind, a directory with the file `marker` in it.

    Where the whole directory is replaced, `written` are the names of the files that such an output
    has: nothing else that lies there, such as .git, may be lost.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not force:
        raise UsageError(f"{path} exists already; choose another path or add --force")
    if not (path / marker).is_file():
        raise UsageError(f"{path} has no {marker}: --force replaces only earlier outputs")
    if written is None:
        return
    if others := sorted({one.name for one in path.iterdir()} - {*written}):
        raise UsageError(
            f"{path} also has {listing(others, 3)}, which --force would delete; choose another path"
        )


def refuse_existing_file(file: Path, force: bool) -> None:
    """Raises UsageError if `file` is a directory, or exists and `force` is not given."""
    if file.is_dir():
        raise UsageError(f"{file} is a directory; name a file")
    if file.exists() and not force:
        raise UsageError(f"{file} exists already; choose another path or add --force")


def refuse_file(directory: Path) -> None:
    """Raises UsageError if `directory`, or a parent of it, is a file."""
    for path in (directory, *directory.parents):
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is a file; --output is a directory")


def absent(path: Path, what: str) -> str:
    """Returns the problem of a path: `d: no such file`, or `d is a directory, not a file`."""
    if not path.exists():
        return f"{path}: no such {what}"
    return f"{path} is a {'directory' if path.is_dir() else 'file'}, not a {what}"


def user_path(text: str) -> Path:
    """Returns a path with `~` expanded, or unchanged if there is no such user."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def file_name(text: str, otherwise: str = "unnamed") -> str:
    """Returns a name that every file system accepts: letters, digits, `_`, `.`, `-`."""
    name = re.sub(r"[^\w.-]+", "-", unicodedata.normalize("NFC", text)).strip(".-")
    name = name.encode()[:MAX_NAME_BYTES].decode(errors="ignore").strip(".-")
    return f"_{name}" if RESERVED.fullmatch(name) else name or otherwise


def sha256(path: Path) -> str:
    """Returns the hex digest of a file, without holding all of it in memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_text(*parts: str) -> str:
    """Returns the hex digest of several texts; it depends on the boundaries between them, too."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Returns a sort key that puts `layers.2` before `layers.10`."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]


@cache
def hub_problem() -> str | None:
    """Returns why the Hugging Face hub cannot be reached, and what to do; None if it answers or
    HF_HUB_OFFLINE is set.

    It makes one short request, because the hub's libraries retry for half a minute without a
    network.
    """
    import errno
    import socket
    from http.client import HTTPException
    from urllib.request import Request, urlopen

    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return None
    unreachable = (socket.gaierror, ConnectionError, TimeoutError, HTTPException)
    try:
        urlopen(Request(ENDPOINT, method="HEAD"), timeout=HUB_TIMEOUT).close()
    except ValueError:
        return f"HF_ENDPOINT {ENDPOINT} is not a URL; it begins with https://"
    except (OSError, HTTPException) as error:  # an HTTP status is an answer
        reason = getattr(error, "reason", error)
        number = getattr(reason, "errno", None)
        if isinstance(reason, unreachable) or number in (errno.ENETUNREACH, errno.EHOSTUNREACH):
            mirror = "" if os.environ.get("HF_ENDPOINT") else "HF_ENDPOINT names a mirror, "
            return (
                f"{ENDPOINT} does not answer ({reason}); "
                f"{mirror}HF_HUB_OFFLINE=1 reads what was downloaded before"
            )
    return None
