"""The documents of a dataset: the values in a file or a hub dataset in order, with their lines.

A document is the value of one line, list item, CSV record or hub row; `formats` interprets it.
"""

import csv
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from loragen.core.errors import DataError, UsageError
from loragen.core.files import file_name, hub_problem

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
NESTED_KEYS = ("messages", "conversations", "choices", "history")
"""Keys whose CSV cells hold JSON."""
MAX_CELL_LENGTH = 2**31 - 1
JSON_LIMITS = (ValueError, RecursionError)
"""The errors that json raises beyond its limits: 4,300 digits, or some thousand brackets."""
HUB_ID = r"[\w.-]+/[\w.-]+"


class Document(NamedTuple):
    """One value of a dataset, or the reason why it could not be read."""

    line: int
    """The first line of the document; in a JSON list, Parquet and on the hub its index. Both are
    counted from 1."""
    value: Any
    problem: str | None = None


@dataclass(frozen=True)
class HubDataset:
    """A dataset of the Hugging Face hub, as `hub:owner/name[:config][@split]`."""

    id: str
    config: str | None
    split: str

    @property
    def name(self) -> str:
        """A name that can be part of a run directory's name; the hub allows any text."""
        return file_name("-".join(filter(None, (self.id.rpartition("/")[2], self.config))))

    def __str__(self) -> str:
        config = f":{self.config}" if self.config else ""
        return f"hub:{self.id}{config}@{self.split}"


Source = Path | HubDataset


def parsed_source(text: str, split: str = "train") -> Source:
    """Returns the source that `hub:owner/name[:config][@split]` or a path names.

    Raises UsageError for a malformed hub id.
    """
    if not text.startswith("hub:"):
        return Path(text)
    parts = re.fullmatch(rf"hub:({HUB_ID})(?::([^\s:@/\\]+))?(?:@(\S+))?", text)
    if parts is None:
        raise UsageError(f"{text}: expected hub:owner/name, hub:owner/name:config or ...@split")
    return HubDataset(parts[1], parts[2], parts[3] or split)


def location(source: Source) -> str:
    """Returns the text from which `parsed_source` finds the source in any working directory."""
    return str(source.absolute() if isinstance(source, Path) else source)


def read_documents(source: Source) -> Iterator[Document]:
    """Yields every document in order; a file with an unknown suffix is read as JSON lines.

    Raises UsageError for a missing file or package, DataError if nothing can be read.
    """
    if isinstance(source, HubDataset):
        rows = read_hub(source.id, source.config, source.split)
        return (Document(line, row) for line, row in enumerate(rows, start=1))
    return file_documents(source, read_bytes(source))


def read_bytes(file: Path) -> bytes:
    """Returns the content of a file. Raises UsageError if it is missing."""
    if not file.is_file():
        raise UsageError(f"{file}: no such file")
    return file.read_bytes()


def file_documents(file: Path, content: bytes) -> Iterator[Document]:
    """Yields the documents in the `content` of a file, whose suffix decides how it is read.

    Raises UsageError for a missing package, DataError if nothing can be read.
    """
    readers = {".json": _json, ".csv": _csv, ".parquet": _parquet}
    return readers.get(file.suffix.lower(), _json_lines)(file, content)


def read_hub(identifier: str, config: str | None, split: str) -> Iterable[dict[str, Any]]:
    """Returns the rows of one split through the `datasets` library, downloaded or from its cache.

    Raises UsageError, within seconds, if they cannot be loaded.
    """
    try:
        import datasets
    except ImportError:
        raise UsageError(
            f"hub dataset {identifier}: needs the package datasets, which is not installed: "
            "pip install 'loragen[data]'"
        ) from None
    why = None if Path(identifier).is_dir() else hub_problem()
    if why:
        raise UsageError(f"hub dataset {identifier}: {why}")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(identifier, config, split=split)  # type: ignore[no-any-return]  # datasets is untyped
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"hub dataset {identifier}: {reason}") from error


def text_lines(file: Path, content: bytes) -> Iterator[tuple[int, str]]:
    """Yields (number from 1, text) of each line of UTF-8 text that is not blank.

    A byte order mark is left out, and only a line feed ends a line, so that the separators of
    Unicode may stand in a text. Raises DataError for other encodings.
    """
    start = 3 if content.startswith(b"\xef\xbb\xbf") else 0
    stream = io.BytesIO(content)
    stream.seek(start)
    for number, line in enumerate(stream, start=1):  # without a list of all lines in memory
        try:
            text = line.decode().removesuffix("\n")
        except UnicodeDecodeError as error:
            raise _not_utf8(file, error, start) from None
        start += len(line)
        if text.strip():
            yield number, text


def _whole_text(file: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(file, error) from None


def _not_utf8(file: Path, error: UnicodeDecodeError, start: int = 0) -> DataError:
    return DataError(f"{file}: not UTF-8 text ({error.reason} at byte {start + error.start})")


def _json_lines(file: Path, content: bytes) -> Iterator[Document]:
    for line, text in text_lines(file, content):
        try:
            yield Document(line, json.loads(text))
        except json.JSONDecodeError as error:
            yield Document(line, None, f"not JSON: {error.msg} at column {error.colno}")
        except JSON_LIMITS as error:
            yield Document(line, None, _beyond_limits(error))


def _json(file: Path, content: bytes) -> Iterator[Document]:
    try:
        document = json.loads(_whole_text(file, content))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # the file has JSON lines under another name
            yield from _json_lines(file, content)
            return
        raise DataError(f"{file}:{error.lineno}: not JSON: {error.msg}") from None
    except JSON_LIMITS as error:
        raise DataError(f"{file}: {_beyond_limits(error)}") from None
    if not isinstance(document, list):
        raise DataError(f"{file}:1: expected a list of rows, found {type(document).__name__}")
    yield from (Document(index, item) for index, item in enumerate(document, start=1))


def _beyond_limits(error: Exception) -> str:
    deep = isinstance(error, RecursionError)
    return "nested too deeply" if deep else "a number in it is too long"


def _csv(file: Path, content: bytes) -> Iterator[Document]:
    records = iter(_csv_records(file, content))
    header = next(records, (1, []))[1]
    twice = sorted({key for key in header if key and header.count(key) > 1})
    if twice:
        raise DataError(f"{file}:1: the header names '{twice[0]}' twice")
    for line, cells in records:
        if len(cells) == len(header):
            named = zip(header, cells, strict=True)
            yield Document(line, {key: _cell(key, cell) for key, cell in named})
        else:
            yield Document(line, None, f"{len(cells)} cells, the header has {len(header)}")


def _csv_records(file: Path, content: bytes) -> list[tuple[int, list[str]]]:
    """Returns (first line, cells) of each record that is not empty; a cell may span lines."""
    reader = csv.reader(io.StringIO(_whole_text(file, content), newline=""), strict=True)
    records, line = [], 1
    limit = csv.field_size_limit(MAX_CELL_LENGTH)  # the default is 131,072 characters
    try:
        for cells in reader:
            if cells:
                records.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{file}:{line}: not CSV: {error}") from None
    finally:
        csv.field_size_limit(limit)
    return records


def _cell(key: str, text: str) -> Any:
    if key in NESTED_KEYS and text.startswith(("[", "{")):
        try:
            return json.loads(text)
        except JSON_LIMITS:  # JSONDecodeError is a ValueError
            pass  # the text is kept, and reported as no list
    return text


def _parquet(file: Path, content: bytes) -> Iterator[Document]:
    try:
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UsageError(
            f"{file}: Parquet needs pyarrow, which is not installed: pip install 'loragen[data]'"
        ) from None
    try:
        with ParquetFile(pa.BufferReader(content)) as table:
            rows = (row for batch in table.iter_batches() for row in batch.to_pylist())
            yield from (Document(line, row) for line, row in enumerate(rows, start=1))
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{file}: not a Parquet file that can be read: {reason}") from None
