"""The documents of a dataset: the values in a file or a hub dataset in order, with their lines.

A document is the value of one line, list item, CSV record or hub row; `formats` interprets it. It
comes from a `Source`: a file, several files as one dataset, a dataset that the `datasets` library
has saved, or one of the hub.
"""

import csv
import glob
import hashlib
import io
import json
import mmap
import re
import sys
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from loragen.core.contents import (
    JSON_ERRORS,
    NULS,
    STRICT_JSON,
    RepeatedKeyError,
    is_stream,
    json_problem,
    nature,
    not_utf8,
    read_bytes,
    utf8_text,
)
from loragen.core.data.formats import AROUND
from loragen.core.errors import DataError, UsageError, first_line, listing, pip_install
from loragen.core.files import file_name, natural_key, path_problem, user_path
from loragen.core.hub import hub_problem

SPLITS = ("train", "test", "val")
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
WRAPPERS = ("examples", "data", "Instances")
"""Keys under which a JSON file may have the list of its rows."""
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"
"""The files by which a directory of `save_to_disk` is recognised: of one split, of several."""
NESTED_KEYS = ("messages", "conversations", "choices", "history", "target_scores")
"""Keys whose CSV cells hold JSON."""
MAX_CELL_LENGTH = 2**31 - 1
HUB_ID = r"[\w.-]+/[\w.-]+"
NO_STREAM = "a training reads its data again when it resumes: save the stream as a file"
ARRAY = "a JSON array, whose name ends in .json"
SEPARATORS = {
    "\t": "columns separated by tabs, whose name ends in .tsv",
    ";": "columns separated by semicolons; save them with commas, as .csv",
    "|": "columns separated by '|'; save them with commas, as .csv",
}


class Document(NamedTuple):
    """One value of a dataset, or the reason why it could not be read."""

    line: int
    """The first line of the document; in a JSON list, Parquet and on the hub its index. Both are
    counted from 1."""
    value: Any
    problem: str | None = None


class Source(ABC):
    """Where a dataset is read from; as a text, how its user names it."""

    @property
    @abstractmethod
    def name(self) -> str:
        """A name of the dataset that can be part of a run directory's name."""

    @property
    def location(self) -> str:
        """The text from which `parsed_source` finds the source in any working directory."""
        return str(Path(str(self)).absolute())

    @property
    @abstractmethod
    def is_missing(self) -> bool:
        """Whether its file or directory is not there; the hub is not asked."""

    @abstractmethod
    def documents(self, digest: Any = None) -> Iterator[Document]:
        """Yields every document in order. The hash `digest` gets the rows, or the bytes of a file.

        Raises UsageError for a missing file or package, DataError if nothing can be read.
        """

    def place(self, line: int) -> str:
        """Returns where a document is, for errors: `file:line`."""
        return f"{self}:{line}"


@dataclass(frozen=True)
class DataFile(Source):
    """A file, or a stream; one with an unknown suffix has JSON lines."""

    path: Path

    @property
    def name(self) -> str:
        """`arc` for `arc_train_formatted.jsonl`, `colors` for `colors/train.jsonl`, `stdin` for a
        stream."""
        if self.is_stream:
            return "stdin"
        stem = self.path.stem.removesuffix("_formatted")
        for split in SPLITS:
            stem = stem.removesuffix(f"_{split}")
        return self.path.absolute().parent.name if stem in SPLITS else stem

    @property
    def suffix(self) -> str:
        """The suffix of its name, in lower case."""
        return self.path.suffix.lower()

    @property
    def is_stream(self) -> bool:
        """Whether it is there for this command alone."""
        return is_stream(self.path)

    @property
    def location(self) -> str:
        return str(self) if self.is_stream else super().location

    @property
    def is_missing(self) -> bool:
        return not self.is_stream and not self.path.is_file()

    def documents(self, digest: Any = None) -> Iterator[Document]:
        content = read_bytes(self.path)
        if digest:
            digest.update(content)
        yield from file_documents(self.path, content)

    def __str__(self) -> str:
        return str(self.path)


class ArrowTable(Source):
    """A source whose rows the `datasets` library has in columns on the disk."""

    @abstractmethod
    def rows(self) -> Sequence[dict[str, Any]]:
        """Returns the rows, which are read from the disk when they are used.

        Raises UsageError if there is none, DataError if it cannot be read.
        """

    def documents(self, digest: Any = None) -> Iterator[Document]:
        yield from table_documents(self.rows(), digest)


@dataclass(frozen=True)
class HubDataset(ArrowTable):
    """A dataset of the Hugging Face hub, as `hub:owner/name[:config][@split]`."""

    id: str
    config: str | None
    split: str

    @property
    def name(self) -> str:
        """The hub allows any text; this can be part of a file's name."""
        return file_name("-".join(filter(None, (self.id.rpartition("/")[2], self.config))))

    @property
    def location(self) -> str:
        return str(self)

    @property
    def is_missing(self) -> bool:
        return False

    def rows(self) -> Sequence[dict[str, Any]]:
        return read_hub(self)

    def __str__(self) -> str:
        config = f":{self.config}" if self.config else ""
        return f"hub:{self.id}{config}@{self.split}"


@dataclass(frozen=True)
class SavedDataset(ArrowTable):
    """One split that the `datasets` library has written with `save_to_disk`."""

    path: Path

    @property
    def name(self) -> str:
        folder = self.path.absolute()
        return folder.parent.name if (folder.parent / SAVED_SPLITS).is_file() else folder.name

    @property
    def is_missing(self) -> bool:
        return not self.path.is_dir()

    def rows(self) -> Sequence[dict[str, Any]]:
        return read_saved(self.path)

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class Shards(Source):
    """Several files as one dataset: those that a pattern such as `rows/part-*.jsonl` matches, in
    natural order. Lines are counted as if one file held all of them."""

    pattern: Path
    _ends: list[int] = field(default_factory=list, compare=False)
    """The last line of each file, once it has been read."""

    @property
    def files(self) -> list[Path]:
        """The files. Raises UsageError if there are none."""
        names = sorted(self._matching, key=natural_key)
        files = [Path(name) for name in names if Path(name).is_file()]
        if not files:
            raise UsageError(f"{self.pattern}: no such files")
        kinds = sorted({file.suffix.lower() for file in files})
        if len(kinds) > 1 or kinds[0] not in SUFFIXES:
            raise UsageError(
                f"{self.pattern}: expected files of one kind ({listing(SUFFIXES)}), "
                f"found {listing([kind or 'no suffix' for kind in kinds])}"
            )
        return files

    @property
    def name(self) -> str:
        """What precedes the first `*`, if that names more than a part; else the directory."""
        start = re.split(r"[*?[]", self.pattern.name)[0].strip("-_.")
        parts = ("", "part", "shard", "data", "train", "test", "val", "validation")
        own = self.pattern.absolute().parent.name
        return file_name((own if start.lower() in parts else start) or "shards")

    @property
    def _matching(self) -> list[str]:
        return glob.glob(str(self.pattern), recursive=True)  # noqa: PTH207  # may be absolute

    @property
    def is_missing(self) -> bool:
        return not self._matching

    def documents(self, digest: Any = None) -> Iterator[Document]:
        """Yields the documents of all files; `digest` gets the hash of each file's bytes."""
        self._ends.clear()
        start = 0
        for file in self.files:
            content = read_bytes(file)
            if digest:
                digest.update(hashlib.sha256(content).digest())
            end = start
            for document in file_documents(file, content):
                end = start + document.line
                yield document._replace(line=end)
            self._ends.append(end)
            start = end

    def place(self, line: int) -> str:
        """Returns file and line of a line that has been read."""
        at = bisect_right(self._ends, line - 1)
        return f"{self.files[at]}:{line - (self._ends[at - 1] if at else 0)}"

    def __str__(self) -> str:
        return str(self.pattern)


def parsed_source(text: str, split: str = "train") -> Source:
    """Returns the source that `hub:owner/name[:config][@split]`, a path, or a pattern with `*`
    names.

    Raises UsageError for a malformed hub id, and for a saved dataset without the split.
    """
    if not text.startswith("hub:"):
        path = user_path(text)
        if glob.has_magic(text) and path_problem(path) is None and not path.exists():
            return Shards(path)
        return saved_dataset(path, split) or DataFile(path)
    parts = re.fullmatch(rf"hub:({HUB_ID})(?::([^\s:@/\\]+))?(?:@(\S+))?", text)
    if parts is None:
        raise UsageError(f"{text}: expected hub:owner/name, hub:owner/name:config or ...@split")
    return HubDataset(parts[1], parts[2], parts[3] or split)


def saved_dataset(folder: Path, split: str) -> SavedDataset | None:
    """Returns the split of a directory that the `datasets` library has written; None for others.

    Raises UsageError, naming the splits, if it has others.
    """
    if path_problem(folder) or not folder.is_dir():
        return None
    if (folder / SAVED).is_file():
        return SavedDataset(folder)
    if not (folder / SAVED_SPLITS).is_file():
        return None
    if (folder / split / SAVED).is_file():
        return SavedDataset(folder / split)
    splits = sorted(state.parent.name for state in folder.glob(f"*/{SAVED}"))
    raise UsageError(f"{folder}: no split '{split}' was saved in it; there is {listing(splits)}")


def place(source: Source | str, line: int) -> str:
    """Returns where a document is, for errors: `file:line`; of rows from no source, `text:line`."""
    return f"{source}:{line}" if isinstance(source, str) else source.place(line)


def table_documents(table: Sequence[Any], digest: Any = None) -> Iterator[Document]:
    """Yields the rows of a table in order; the hash `digest` gets each of them."""
    for line, row in enumerate(table, start=1):
        if digest:
            data = json.dumps(row, default=str).encode()
            digest.update(len(data).to_bytes(8, "little") + data)
        yield Document(line, row)


def file_documents(file: Path, content: bytes) -> Iterator[Document]:
    """Yields the documents in the `content` of a file, whose suffix decides how it is read.

    Raises UsageError for a missing package, DataError if nothing can be read.
    """
    readers = {".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
    suffix = file.suffix.lower()
    if is_stream(file):
        start = content.lstrip()[:4]
        suffix = ".parquet" if start == b"PAR1" else ".json" if start[:1] == b"[" else ".jsonl"
    return readers.get(suffix, _json_lines)(file, content)


def read_hub(source: HubDataset) -> Sequence[dict[str, Any]]:
    """Returns the rows of one split through the `datasets` library, downloaded or from its cache,
    whose files are memory-mapped. Of a slice in rows, such as `train[:1000]`, only the rows up to
    its end are fetched.

    Raises UsageError, within seconds, if they cannot be loaded.
    """
    what = f"hub dataset {source.id}"
    datasets = _datasets(what)
    why = None if Path(source.id).is_dir() else hub_problem()
    if why:
        raise UsageError(f"{what}: {why}")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    sliced = re.fullmatch(r"(\w+)\[(\d*):(\d+)\]", source.split)
    try:
        if sliced is None:
            return datasets.load_dataset(source.id, source.config, split=source.split)  # type: ignore[no-any-return]  # datasets is untyped
        first, end = int(sliced[2] or 0), int(sliced[3])
        rows = datasets.load_dataset(source.id, source.config, split=sliced[1], streaming=True)
        return list(rows.skip(first).take(max(0, end - first)))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"{what}: {reason}") from error


def read_saved(folder: Path) -> Sequence[dict[str, Any]]:
    """Returns the rows of a dataset that `save_to_disk` has written; its files are memory-mapped.

    Raises UsageError for a missing package, DataError if it cannot be read.
    """
    datasets = _datasets(f"{folder}: a saved dataset")
    try:
        return datasets.load_from_disk(str(folder))  # type: ignore[no-any-return]  # datasets is untyped
    except Exception as error:  # pyarrow and json have many
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{folder}: not a saved dataset that can be read: {reason}") from error


def _datasets(what: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise UsageError(
            f"{what}: needs the package datasets, which is not installed: {pip_install('data')}"
        ) from None
    return datasets


def text_lines(file: Path, content: bytes) -> Iterator[tuple[int, str]]:
    """Yields (number from 1, text) of each line of UTF-8 text that is not blank.

    Byte order marks are left out, and only a line feed ends a line, so that the separators of
    Unicode may stand in a text. Raises DataError that says what the file is for any other.
    """
    if what := nature(content):
        raise DataError(f"{file}: not UTF-8 text; it is {what}")
    start = 0
    for number, line in enumerate(io.BytesIO(content), start=1):  # without a list of all lines
        try:
            text = line.decode().removeprefix("\ufeff").removesuffix("\n")
        except UnicodeDecodeError as error:
            raise not_utf8(file, content, start + error.start) from None
        start += len(line)
        if text.strip():
            yield number, text


def _json_lines(file: Path, content: bytes) -> Iterator[Document]:
    first = True
    for line, text in text_lines(file, content):
        try:
            value = STRICT_JSON.decode(text)
            if first and isinstance(value, list):
                raise DataError(f"{file}: not JSON lines; it is {ARRAY}")
            yield Document(line, value)
        except JSON_ERRORS as error:
            not_json = isinstance(error, json.JSONDecodeError)
            if first and not_json and (what := _instead_of_json_lines(content)):
                raise DataError(f"{file}: not JSON lines; it is {what}") from None
            yield Document(line, None, json_problem(text, error))
        first = False


def _instead_of_json_lines(content: bytes) -> str | None:
    """Returns what text, whose first line is not JSON, is instead; None if that is not clear."""
    text = content.decode("utf-8-sig", errors="replace").strip()
    start, header = text[:1], text.partition("\n")[0]
    if "\r" in header.strip():
        return "text whose lines end with a carriage return; save it with line feeds"
    if start in "[{":
        try:
            value, end = json.JSONDecoder().raw_decode(text)
        except JSON_ERRORS:
            printed = "dictionaries that Python has printed (json.dumps writes JSON)"
            return printed if re.match(r"\{\s*'", text) else None
        if isinstance(value, list):
            return ARRAY
        if text[end:].lstrip().startswith(","):
            return "rows with commas between them; JSON lines have none"
        if "\n" in text[:end]:
            return "JSON over several lines; a row has one line (jq -c . FILE)"
        return "several rows on one line; each has its own (jq -c . FILE)"
    lines = text.splitlines()
    for mark, kind in (*SEPARATORS.items(), (",", "CSV, whose name ends in .csv")):
        if len(lines) > 1 and mark in header and header.count(mark) == lines[1].count(mark):
            return kind if mark == "," else f"text with {kind}"
    return None


def _json(file: Path, content: bytes) -> Iterator[Document]:
    text = utf8_text(file, content)
    if not text.strip():
        return
    try:
        document = STRICT_JSON.decode(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # the file has JSON lines under another name
            yield from _json_lines(file, content)
            return
        raise DataError(f"{file}:{error.lineno}: {json_problem(text, error)}") from None
    except JSON_ERRORS as error:
        if isinstance(error, RepeatedKeyError) and text.lstrip().startswith("["):
            yield from _items_of_list(text)
            return
        raise DataError(f"{file}: {json_problem(text, error)}") from None
    if isinstance(document, dict):
        document = _unwrapped(file, document)
    elif not isinstance(document, list):
        found = type(document).__name__
        raise DataError(f"{file}:1: expected a list of rows, found {found}")
    yield from (Document(index, item) for index, item in enumerate(document, start=1))


def may_hold_rows(file: Path) -> bool:
    """Returns False for a `.json` file that is an object without a list of rows in it, such as a
    table of what the datasets beside it are; it is not parsed, and read up to the list at most."""
    if file.suffix.lower() != ".json" or not file.is_file() or not file.stat().st_size:
        return True
    wrapped = rb'"(?:' + "|".join(WRAPPERS).encode() + rb')"\s*:\s*\['
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as held:
        single = re.match(rb"(?:\xef\xbb\xbf)?\s*\{", held)
        return not single or bool(re.search(wrapped + rb"|\}\s*\n\s*\{", held))


def _unwrapped(file: Path, document: dict[str, Any]) -> list[Any]:
    """Returns the rows of an object that has them under one of `WRAPPERS`, each with the texts that
    stand around them (`AROUND`). A list of such texts is one text. Raises DataError for others."""
    lists = [key for key, value in document.items() if isinstance(value, list)]
    wrappers = [key for key in WRAPPERS if key in lists]
    if len(wrappers) != 1:
        inside = f"; the rows may be in its '{lists[0]}'" if len(lists) == 1 else ""
        if wrappers:
            inside = f" with rows in {' and '.join(map(repr, wrappers))}"
        raise DataError(f"{file}:1: expected a list of rows, found dict{inside}")
    around = {}
    for key in AROUND:
        value = document.get(key)
        if isinstance(value, list) and all(isinstance(part, str) for part in value):
            value = "\n".join(value)
        if value is not None:
            around[key] = value
    rows = document[wrappers[0]]
    return [around | row if isinstance(row, dict) else row for row in rows]


def _items_of_list(text: str) -> Iterator[Document]:
    """Yields the items of a JSON list, of which some have a key twice."""
    between, end = re.compile(r"[ \t\r\n,]*"), text.rindex("]")
    index, at = 0, text.index("[") + 1
    while (at := between.match(text, at).end()) < end:  # type: ignore[union-attr]  # it may be empty
        index += 1
        try:
            value, at = STRICT_JSON.raw_decode(text, at)
            yield Document(index, value)
        except RepeatedKeyError as error:
            _, at = json.JSONDecoder().raw_decode(text, at)
            yield Document(index, None, str(error))


def _csv(file: Path, content: bytes) -> Iterator[Document]:
    kind, separator = ("TSV", "\t") if file.suffix.lower() == ".tsv" else ("CSV", ",")
    if content.lstrip()[:1] in (b"{", b"["):
        raise DataError(f"{file}: not {kind}; it is JSON (.jsonl if a row has a line, else .json)")
    text = utf8_text(file, content)
    first = text.lstrip().partition("\n")[0]
    outside = re.sub(r'"[^"]*"', "", first)  # without what stands in quotation marks
    marks = {**SEPARATORS, ",": "columns separated by commas, whose name ends in .csv"}
    most = max(marks, key=outside.count)
    if outside.count(most) > outside.count(separator):
        expected = "tab" if separator == "\t" else "comma"
        raise DataError(f"{file}:1: not {expected}-separated; it has {marks[most]}")
    records = iter(_csv_records(file, text, kind, separator))
    header = next(records, (1, []))[1]
    if blank := [key for key in header if key != key.strip()]:
        raise DataError(f"{file}:1: the header has {blank[0]!r}: take the white space away")
    twice = sorted(key for key, count in Counter(header).items() if key and count > 1)
    if twice:
        raise DataError(f"{file}:1: the header names '{twice[0]}' twice")
    for line, cells in records:
        if len(cells) == len(header):
            named = zip(header, cells, strict=True)
            try:
                yield Document(line, {key: _cell(key, cell) for key, cell in named})
            except DataError as error:
                yield Document(line, None, str(error))
        elif any("\0" in cell for cell in cells):
            yield Document(line, None, NULS)
        else:
            yield Document(line, None, f"{len(cells)} cells, the header has {len(header)}")


def _csv_records(file: Path, text: str, kind: str, separator: str) -> list[tuple[int, list[str]]]:
    """Returns (first line, cells) of each record that is not empty; a cell may span lines."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=separator)
    records, line = [], 1
    limit = csv.field_size_limit(MAX_CELL_LENGTH)  # the default is 131,072 characters
    try:
        for cells in reader:
            if cells:
                records.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        quoted = " (a cell that begins with a quotation mark has to end with one)"
        hint = quoted if "expected after" in str(error) or "end of data" in str(error) else ""
        raise DataError(f"{file}:{line}: not {kind}: {error}{hint}") from None
    finally:
        csv.field_size_limit(limit)
    return records


def _cell(key: str, text: str) -> Any:
    if key in NESTED_KEYS and text.startswith(("[", "{")):
        try:
            return STRICT_JSON.decode(text)
        except RepeatedKeyError as error:
            raise DataError(f"'{key}': {error}") from None
        except JSON_ERRORS:
            pass  # the text is kept, and reported as no list
    return text


def _parquet(file: Path, content: bytes) -> Iterator[Document]:
    try:
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UsageError(
            f"{file}: Parquet needs pyarrow, which is not installed: {pip_install('data')}"
        ) from None
    if not content.startswith(b"PAR1"):
        text = "text, perhaps JSON lines (.jsonl)" if content[:1] in (b"{", b"[") else None
        if what := nature(content) or text:
            raise DataError(f"{file}: not a Parquet file; it is {what}")
    elif not content.endswith(b"PAR1"):
        raise DataError(f"{file}: a Parquet file without its end: it is truncated")
    try:
        with ParquetFile(pa.BufferReader(content)) as table:
            names = Counter(table.schema_arrow.names)
            if twice := [name for name, count in names.items() if count > 1]:
                raise DataError(f"{file}: two columns are called '{twice[0]}'")
            rows = (row for batch in table.iter_batches() for row in batch.to_pylist())
            yield from (Document(line, row) for line, row in enumerate(rows, start=1))
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{file}: not a Parquet file that can be read: {first_line(error)}"
        ) from None
