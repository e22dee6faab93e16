"""Atomic writing, checks of paths, names and hashes of files, what a file is by its bytes, and one
check of the hub."""

import codecs
import errno
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from loragen.core.errors import DataError, LoragenError, UsageError, WriteError

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
HUB_TIMEOUT = 10
"""Seconds to wait for the hub's answer."""


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
    except RuntimeError:
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


# ---------------------------------------------------------------------------- what a file is

SNIFFED = 2**16
"""The bytes at the start of a file from which `nature` tells what it is."""
SAFETENSORS = "a safetensors file"
UNPACK = "compressed ({}); unpack it first"
SIGNATURES = {
    b"version https://git-lfs": "a pointer of Git LFS; `git lfs pull` fetches the file itself",
    b"PAR1": "a Parquet file, whose name ends in .parquet",
    b"ARROW1": "an Arrow file; save it as Parquet or JSON lines",
    b"GGUF": "a GGUF file",
    b"\x1f\x8b": UNPACK.format("gzip"),
    b"BZh": UNPACK.format("bzip2"),
    b"\xfd7zXZ": UNPACK.format("xz"),
    b"(\xb5/\xfd": UNPACK.format("zstandard"),
    b"7z\xbc\xaf": UNPACK.format("7z"),
    b"%PDF-": "a PDF",
    b"SQLite format 3": "an SQLite database",
    b"\x93NUMPY": "an array of NumPy",
    b"\x89HDF": "an HDF5 file",
    b"\xd0\xcf\x11\xe0": "an Office document; save it as CSV in UTF-8",
    b"\x80\x02": "a pickle of Python",
    b"\x80\x03": "a pickle of Python",
    b"\x80\x04": "a pickle of Python",
    b"\x80\x05": "a pickle of Python",
}
"""{first bytes: what the file is}"""
IN_ARCHIVES = {
    b"xl/": "an Excel workbook; save it as CSV in UTF-8",
    b"word/": "a Word document",
    b"data.pkl": "a file of torch.save",
    b".npy": "arrays of NumPy",
}
"""{part of a name in a ZIP archive: what the archive is}"""
ENCODINGS = {
    "Shift-JIS": ("shift_jis", r"[\u3041-\u30ff]", 0.2),
    "EUC-KR": ("euc_kr", r"[\uac00-\ud7a3]", 0.9),
    "GB18030": ("gb18030", r"[\u3000-\u303f\uff00-\uffef\u4e00-\u9fff]", 0.95),
    "Big5": ("big5", r"[\u3000-\u303f\uff00-\uffef\u4e00-\u9fff]", 0.95),
}
"""{encoding: (codec, characters, least share of these)}, by which text of it is recognised."""


STREAMS = ("-", "/dev/stdin")
"""The names of standard input."""


def is_stream(path: Path) -> bool:
    """Returns whether a path is a pipe, standard input or an open file (`-`, `<(command)`,
    `/dev/fd/3`), which is there for this command alone and has no suffix."""
    if str(path) in STREAMS or path.parent in (Path("/dev/fd"), Path("/proc/self/fd")):
        return True
    return path_problem(path) is None and path.is_fifo()


def read_bytes(file: Path, what: str = "file") -> bytes:
    """Returns the content of a file; that of a stream is kept, since it can be read only once.

    Raises UsageError if it is missing, or cannot be read.
    """
    if str(file) in STREAMS:
        return _read_stream(STREAMS[0], sys.stdin)
    if problem := path_problem(file):
        raise UsageError(f"{str(file)[:60]}...: {problem}")
    try:
        if is_stream(file):
            return _read_stream(str(file), file.stat().st_ino)
        if not file.is_file():
            raise UsageError(absent(file, what))
        return file.read_bytes()
    except OSError as error:
        raise UsageError(f"{file}: cannot be read: {error.strerror}") from None


@cache
def _read_stream(name: str, _: object) -> bytes:
    return sys.stdin.buffer.read() if name in STREAMS else Path(name).read_bytes()


def nature(content: bytes) -> str | None:
    """Returns what a file is, and how to make text of it, from its bytes or the first `SNIFFED` of
    them; None for UTF-8 text, for an empty file and for what is not known."""
    head = content[:SNIFFED]
    if head.startswith(b"PK\x03\x04"):
        kinds = (what for part, what in IN_ARCHIVES.items() if part in head)
        return next(kinds, UNPACK.format("ZIP"))
    if (what := next((SIGNATURES[s] for s in SIGNATURES if head.startswith(s)), None)) is not None:
        return what
    if re.match(rb"\s*(<!doctype html|<html)", head, re.IGNORECASE):
        return "a web page, perhaps that of an error or of a login"
    if head[8:10] == b'{"' and int.from_bytes(head[:8], "little") < 2**27:
        return SAFETENSORS
    encoding = _encoding(head)
    if encoding == "NUL":
        return "nothing but NUL bytes: it was never written to its end"
    return encoding and f"{encoding} text; save it as UTF-8 (iconv -f {encoding} -t UTF-8 FILE)"


def _encoding(head: bytes) -> str | None:
    """Returns the encoding of text that is not UTF-8, `NUL` for zeros alone, None if unknown."""
    if head and not any(head):
        return "NUL"
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    even, odd = head[::2].count(0), head[1::2].count(0)
    if max(even, odd) > max(4, 0.15 * len(head)) and min(even, odd) < 0.1 * max(even, odd):
        return "UTF-16LE" if odd > even else "UTF-16BE"  # other text has no NUL
    seen = re.sub(r"[\x00-\x7f]", "", head.decode(errors="replace"))
    if seen.count("\ufffd") <= 0.2 * len(seen) or _decoded(head, "utf-8") is not None:
        return None  # UTF-8, of which some bytes may be damaged
    for name, (codec, characters, least) in ENCODINGS.items():
        text = _decoded(head, codec)
        foreign = re.sub(r"[\x00-\x7f]", "", text or "")
        if foreign and len(re.findall(characters, foreign)) >= least * len(foreign):
            return name
    high = sum(byte > 127 for byte in head)
    return "Windows-1252" if high < 0.2 * len(head) and b"\0" not in head else None


def _decoded(head: bytes, codec: str) -> str | None:
    """Returns the text without a last character that is cut off; None if it is not of the codec."""
    try:
        return codecs.getincrementaldecoder(codec)().decode(head)
    except UnicodeDecodeError:
        return None


def not_utf8(file: Path, content: bytes, at: int) -> DataError:
    """Returns the error of a file whose byte `at` is not UTF-8: the line, and what it is."""
    line, start = content.count(b"\n", 0, at) + 1, content.rfind(b"\n", 0, at) + 1
    rest = content[at + 1 :]
    if content[at] >= 0xC2 and len(rest) < 3 and all(0x80 <= byte < 0xC0 for byte in rest):
        reason = ": it ends within a character (truncated?)"
    else:
        what = nature(content) or nature(content[start:])
        reason = f"; it is {what}" if what else f" (byte {at} is 0x{content[at]:02x})"
    return DataError(f"{file}:{line}: not UTF-8 text{reason}")


def utf8_text(file: Path, content: bytes) -> str:
    """Returns the text of a file in UTF-8, without a byte order mark. Raises DataError (file:line)
    that says what the file is instead."""
    if what := nature(content):
        raise DataError(f"{file}: not UTF-8 text; it is {what}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bom = 3 if content.startswith(codecs.BOM_UTF8) else 0
        raise not_utf8(file, content, error.start + bom) from None


class RepeatedKeyError(ValueError):
    """A JSON object has a key twice, of which json would silently keep the last."""


def without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RepeatedKeyError(f"the key '{twice}' is given twice")
    return found


parse_json = json.JSONDecoder(object_pairs_hook=without_repeated_keys).decode
"""`json.loads` that raises RepeatedKeyError."""


def read_json(file: Path) -> Any:
    """Returns the document of a JSON file. Raises DataError (file:line) for any other file."""
    text = utf8_text(file, read_bytes(file))
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        cut = " (the file ends there: truncated?)" if not text[error.pos :].strip() else ""
        empty = "" if text.strip() else ": it is empty"
        raise DataError(
            f"{file}:{error.lineno}: not JSON{empty or f': {error.msg}{cut}'}"
        ) from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise DataError(f"{file}: not JSON: {reason}") from None


def safetensors_fault(file: Path) -> str | None:
    """Returns why a file is not a whole safetensors file: what it is instead, or how much of it is
    missing; None if its header fits its size."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(SNIFFED)
        what = nature(head)
        if not head or (what and what != SAFETENSORS):
            return f"it is {what or 'empty'}"
        length = int.from_bytes(head[:8], "little")
        if length > size - 8:
            return "truncated: the end of its header is missing" if what else None
        stream.seek(8)
        header = stream.read(length)
    try:
        tensors = {key: of for key, of in json.loads(header).items() if key != "__metadata__"}
        missing = 8 + length + max(of["data_offsets"][1] for of in tensors.values()) - size
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    return f"truncated: {missing:,} bytes are missing" if missing > 0 else None


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
