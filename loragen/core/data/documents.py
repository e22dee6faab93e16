"""Datasets of the Hugging Face hub, through the `datasets` library where it is installed.

What a file or a hub dataset holds, one document after the other, and where each stands.

What a document means (a row, a prompt) is not decided here.
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
from loragen.core.files import file_name, sha256, sha256_text, silence


def read_hub(identifier: str, config: str | None, split: str) -> Iterable[dict[str, Any]]:
    """The rows of one split, downloaded or from the cache.

    Raises UsageError, within seconds, where they cannot be had.
    """
    try:
        import datasets
    except ImportError:
        raise UsageError(
            f"hub dataset {identifier}: needs the package datasets, which is not installed: "
            "pip install 'loragen[data]'"
        ) from None
    why = None if Path(identifier).is_dir() else silence()
    if why:
        raise UsageError(f"hub dataset {identifier}: {why}")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(identifier, config, split=split)  # type: ignore[no-any-return]  # rows are mappings
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"hub dataset {identifier}: {reason}") from error


SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
NESTED = ("messages", "conversations", "choices", "history")  # as JSON in a CSV cell
LONGEST_CELL = 2**31 - 1
TOO_MUCH = (ValueError, RecursionError)  # of JSON: 4,300 digits, or some thousand brackets
HUB_ID = r"[\w.-]+/[\w.-]+"


class Document(NamedTuple):
    line: int
    """From 1: the line where it starts; in a JSON list, Parquet and on the hub its index."""
    value: Any
    problem: str | None = None
    """Why there is no value, where it could not be read."""


@dataclass(frozen=True)
class HubDataset:
    """A dataset of the Hugging Face hub, as `hub:owner/name[:config][@split]`."""

    id: str
    config: str | None
    split: str

    @property
    def name(self) -> str:
        """Good for a run's name; a configuration may be called anything."""
        return file_name("-".join(filter(None, (self.id.rpartition("/")[2], self.config))))

    def __str__(self) -> str:
        config = f":{self.config}" if self.config else ""
        return f"hub:{self.id}{config}@{self.split}"


Source = Path | HubDataset


def parsed_source(text: str, split: str = "train") -> Source:
    """`hub:owner/name[:config][@split]` or a path.

    Raises UsageError for a malformed hub id.
    """
    if not text.startswith("hub:"):
        return Path(text)
    parts = re.fullmatch(rf"hub:({HUB_ID})(?::([^\s:@/\\]+))?(?:@(\S+))?", text)
    if parts is None:
        raise UsageError(f"{text}: expected hub:owner/name, hub:owner/name:config or ...@split")
    return HubDataset(parts[1], parts[2], parts[3] or split)


def location(source: Source) -> str:
    """What finds the source again, from any working directory, through `parsed_source`."""
    return str(source.absolute() if isinstance(source, Path) else source)


def content_hash(source: Source) -> str:
    """The hex digest of a file's bytes, or of a hub dataset's rows."""
    if isinstance(source, Path):
        return sha256(source)
    rows = (json.dumps(document.value, default=str) for document in read_documents(source))
    return sha256_text(*rows)


def read_documents(source: Source) -> Iterator[Document]:
    """Every document in order; a file with no known suffix is taken for JSON lines.

    Raises UsageError for a missing file or package, DataError where nothing can be read.
    """
    if isinstance(source, HubDataset):
        rows = read_hub(source.id, source.config, source.split)
        return (Document(line, row) for line, row in enumerate(rows, start=1))
    if not source.is_file():
        raise UsageError(f"{source}: no such file")
    readers = {".json": _json, ".csv": _csv, ".parquet": _parquet}
    return readers.get(source.suffix.lower(), _json_lines)(source)


def utf8_text(file: Path) -> str:
    """The text of a file, without a byte order mark. Raises DataError where it is not UTF-8."""
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def _json_lines(file: Path) -> Iterator[Document]:
    for line, content in enumerate(utf8_text(file).split("\n"), start=1):
        if content.strip():
            try:
                yield Document(line, json.loads(content))
            except json.JSONDecodeError as error:
                yield Document(line, None, f"not JSON: {error.msg} at column {error.colno}")
            except TOO_MUCH as error:
                yield Document(line, None, _too_much(error))


def _json(file: Path) -> Iterator[Document]:
    try:
        document = json.loads(utf8_text(file))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON lines under another name
            yield from _json_lines(file)
            return
        raise DataError(f"{file}:{error.lineno}: not JSON: {error.msg}") from None
    except TOO_MUCH as error:
        raise DataError(f"{file}: {_too_much(error)}") from None
    if not isinstance(document, list):
        raise DataError(f"{file}:1: expected a list of rows, found {type(document).__name__}")
    yield from (Document(index, item) for index, item in enumerate(document, start=1))


def _too_much(error: Exception) -> str:
    deep = isinstance(error, RecursionError)
    return "nested too deeply" if deep else "a number in it is too long"


def _csv(file: Path) -> Iterator[Document]:
    records = iter(_csv_records(file))
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


def _csv_records(file: Path) -> list[tuple[int, list[str]]]:
    """(first line, cells) of each record that is not empty. A quoted cell may span lines."""
    reader = csv.reader(io.StringIO(utf8_text(file), newline=""), strict=True)
    records, line = [], 1
    limit = csv.field_size_limit(LONGEST_CELL)  # the module's own is 131,072 characters
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
    if key in NESTED and text.startswith(("[", "{")):
        try:
            return json.loads(text)
        except TOO_MUCH:  # JSONDecodeError is a ValueError
            pass  # it stays a text, which is then reported as no list
    return text


def _parquet(file: Path) -> Iterator[Document]:
    try:
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UsageError(
            f"{file}: Parquet needs pyarrow, which is not installed: pip install 'loragen[data]'"
        ) from None
    try:
        with ParquetFile(file) as table:
            rows = (row for batch in table.iter_batches() for row in batch.to_pylist())
            yield from (Document(line, row) for line, row in enumerate(rows, start=1))
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{file}: not a Parquet file that can be read: {reason}") from None
