"""What is in a file: its bytes or its text, read once and named by what they are."""

import codecs
import json
import re
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from loragen.core.errors import DataError, UsageError
from loragen.core.files import absent, path_problem

Model = TypeVar("Model", bound=BaseModel)

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


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise RepeatedKeyError(f"the key '{twice}' is given twice")
    return found


STRICT_JSON = json.JSONDecoder(object_pairs_hook=_without_repeated_keys)
"""Decodes as `json` does, but raises RepeatedKeyError."""
JSON_ERRORS = (ValueError, RecursionError)
"""What it raises, also beyond the limits of Python: 4,300 digits, or some thousand brackets."""
NULS = "NUL bytes in it; the file is damaged, or was not written to its end"


def json_problem(text: str, error: Exception) -> str:
    """Returns why a text does not decode: one of `JSON_ERRORS`, or what that does not say."""
    if isinstance(error, RepeatedKeyError):
        return str(error)
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if not isinstance(error, json.JSONDecodeError):
        return "a number in it is too long"
    if "\0" in text:
        return f"not JSON: {NULS}"
    if not text.strip():
        return "not JSON: it is empty"
    cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
    ends = " (it ends there: truncated?)" if cut else ""
    return f"not JSON: {error.msg} at column {error.colno}{ends}"


def read_json(file: Path) -> Any:
    """Returns the document of a JSON file. Raises DataError (file:line) for any other file."""
    text = utf8_text(file, read_bytes(file))
    try:
        return STRICT_JSON.decode(text)
    except JSON_ERRORS as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{file}{line}: {json_problem(text, error)}") from None


def record_of(document: Any, kind: type[Model], file: Path, what: str) -> Model:
    """Returns the document of a file as its model, whose default `format_version` is the newest one
    that is known. Raises DataError if it is not `what`, or of a newer format."""
    try:
        found = kind.model_validate(document)
    except ValidationError as error:
        reason = "; ".join(str(error).splitlines()[:2])
        raise DataError(f"{file}: not {what}: {reason}") from None
    known = kind.model_fields["format_version"].default
    if (version := dict(found)["format_version"]) > known:
        raise DataError(
            f"{file}: format {version} is newer than this loragen reads ({known}); upgrade loragen"
        )
    return found


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
