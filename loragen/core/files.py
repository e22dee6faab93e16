"""Atomic writing, checks of paths, names and hashes of files."""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loragen.core.errors import LoragenError, WriteError

MAX_NAME_BYTES = 120
"""File systems allow 255; this leaves room for suffixes, numbers and temporary names."""
RESERVED = re.compile(r"(con|prn|aux|nul|(com|lpt)[\d¹²³])(\..*)?", re.IGNORECASE)
"""Names of devices on Windows, which no file may have, with any suffix."""
HELD_SECONDS = 2.0 if os.name == "nt" else 0.0
"""How long a renaming is tried again: on Windows it fails while another program, such as a virus
scanner, has the file open."""
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
WRITING_FAILED = re.compile(r"\(os error \d+\)|PytorchStreamWriter|inline_container|unexpected pos")
"""What safetensors and torch say where a write has failed."""
UNFINISHED = ".unfinished"
"""The end of the names of directories that hold what is being written."""


@contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, and renames it to `path` once the block has succeeded.

    The block writes a file or makes a directory there; after an error, everything is as before. A
    process that is killed leaves one of the two versions. A power failure does too if the block has
    synced its file. Raises WriteError if the disk is full or cannot be written.
    """
    prefix = f".{path.name[:40]}."  # so that a name of the greatest length has a holder
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        holder = Path(tempfile.mkdtemp(UNFINISHED, prefix, path.parent))
    new, old = holder / path.name, holder / f"{path.name}.old"
    try:
        with write_errors(path, holder):
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


@contextmanager
def write_errors(path: Path, place: Path | None = None) -> Iterator[None]:
    """Raises WriteError `path: cannot be written: No space left on device` for what the block
    raises because a disk is full or cannot be written, whichever library writes.

    Those libraries do not all say why: torch says that a write has failed. The reason is then what
    writing a megabyte into the directory `place` raises.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise WriteError(f"{path}: cannot be written: {error.strerror}") from error
    except Exception as error:
        if isinstance(error, LoragenError) or not WRITING_FAILED.search(str(error)):
            raise
        number = re.search(r"\(os error (\d+)\)", str(error))
        reason = os.strerror(int(number[1])) if number else _disk_problem(place or path.parent)
        raise WriteError(f"{path}: cannot be written: {reason}") from error


def _disk_problem(directory: Path) -> str:
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(2**20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return str(error.strerror)
    return "its disk is full, or a limit of its size is reached"


def reserve(file: Path) -> None:
    """Reserves the space of a file of its size that is memory-mapped and still empty. On a full
    disk, writing to the map would end the process without a word (SIGBUS). Raises OSError."""
    if hasattr(os, "posix_fallocate") and file.stat().st_size:
        with file.open("r+b") as opened:
            try:
                os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
            except OSError as error:
                if error.errno in DISK_ERRORS:  # others say that the file system cannot reserve
                    raise


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


def remove_unfinished(directory: Path, pattern: str = f".*{UNFINISHED}") -> None:
    """Removes temporary files that a process killed inside `written_atomically` has left."""
    for holder in [*directory.glob(pattern), *directory.glob(f"*/{pattern}")]:
        if holder.is_dir():
            shutil.rmtree(holder, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 with line feeds, atomically, and syncs it with the disk. The bytes of a file
    name that are no text are escaped."""
    with written_atomically(path) as temporary, temporary.open("wb") as file:
        file.write(text.encode(errors="backslashreplace"))
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, document: Any) -> None:
    """Writes a document as indented JSON, atomically."""
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def absent(path: Path, what: str) -> str:
    """Returns the problem of a path: `d: no such file`, or `d is a directory, not a file`."""
    if not path.exists():
        return f"{path}: no such {what}"
    return f"{path} is a {'directory' if path.is_dir() else 'file'}, not a {what}"


def path_problem(path: Path) -> str | None:
    """Returns why no file can have this name: it is too long, or has a NUL; else None."""
    try:
        path.lstat()
    except ValueError:
        return "a name cannot hold a NUL character"
    except OSError as error:
        return "the name is too long" if error.errno == errno.ENAMETOOLONG else None
    return None


def user_path(text: str) -> Path:
    """Returns a path with `~` expanded, or unchanged if there is no such user."""
    try:
        return Path(text).expanduser()
    except (RuntimeError, ValueError):  # ValueError: a NUL in the user's name
        return Path(text)


def file_name(text: str, otherwise: str = "unnamed") -> str:
    """Returns a name that every file system accepts: letters, digits, `_`, `.`, `-`."""
    name = re.sub(r"[^\w.-]+", "-", unicodedata.normalize("NFC", text)).strip(".-")
    name = name.encode()[:MAX_NAME_BYTES].decode(errors="ignore").strip(".-")
    return f"_{name}" if RESERVED.fullmatch(name) else name or otherwise


def bounded_name(name: str) -> str:
    """Returns a name that leaves room for suffixes in a file's name: one that is longer than
    `MAX_NAME_BYTES` is cut, and ends in a hash of the whole that keeps it apart from others."""
    encoded = os.fsencode(name)  # a file name may hold bytes that are no text
    if len(encoded) <= MAX_NAME_BYTES:
        return name
    start = encoded[: MAX_NAME_BYTES - 9].decode(errors="ignore")
    return f"{start}-{hashlib.sha256(encoded).hexdigest()[:8]}"


def sha256(path: Path) -> str:
    """Returns the hex digest of a file, without holding all of it in memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def crc32(path: Path) -> str:
    """Returns the CRC-32 of a file as 8 hex digits: a check of what a disk or a transfer has
    damaged, at 2 GB/s, and not of what somebody has changed on purpose."""
    found = 0
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            found = zlib.crc32(chunk, found)
    return f"{found:08x}"


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
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]
