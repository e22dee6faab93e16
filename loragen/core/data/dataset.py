"""A dataset, which is opened once per command and read in one pass when it is first needed.

`Dataset.find` finds one by name. Its rows are labelled examples; its prompts need no labels. This
module imports nothing heavy.
"""

import glob
import hashlib
import json
import logging
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, overload

from loragen.core.contents import read_bytes
from loragen.core.data.documents import (
    HUB_ID,
    SAVED,
    SPLITS,
    SUFFIXES,
    ArrowTable,
    DataFile,
    Document,
    HubDataset,
    Shards,
    Source,
    file_documents,
    may_hold_rows,
    parsed_source,
    place,
    saved_dataset,
    table_documents,
    text_lines,
)
from loragen.core.data.formats import Turn, format_of, question_of, texts
from loragen.core.errors import DataError, LoragenError, UsageError, did_you_mean, listing
from loragen.core.files import absent, bounded_name, path_problem

log = logging.getLogger(__name__)

MAX_SHOWN = 5
"""The number of bad rows that an error or a warning names."""
MAX_CLOSED_ANSWERS = 16
"""The answers of a dataset with more distinct ones are free."""
PREPARED_KEYS = ("prompt", "prompts", "dataset", "lines")
"""The keys of a line of `data prepare`, which holds several prompts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One labelled example. `line` is its line in the file, counted from 1."""

    prompt: str
    response: str
    system: str | None = None
    history: tuple[Turn, ...] = ()
    """Earlier turns of the conversation: context, without a loss."""
    choices: list[str] | None = None
    """The answers to choose between, if the dataset states them."""
    also_right: tuple[str, ...] = ()
    """Other answers than the response that an evaluation counts as right."""
    line: int


class Prompt(NamedTuple):
    """A prompt and its line in the file, counted from 1."""

    line: int
    text: str


class BadRow(NamedTuple):
    """A row that cannot be used, and the reason."""

    line: int
    reason: str


def _parsed(line: int, value: Any) -> tuple[Row, str, bool]:
    """Returns a document as a row, the name of its format, and whether its answer is a number or a
    boolean, taken as its JSON text. Raises DataError if it is no row."""
    known = format_of(value)
    question, answer = known.question(value), known.answer(value)
    row = Row(
        **question._asdict(), response=answer.response, also_right=answer.also_right, line=line
    )
    return row, known.name, answer.as_json


class _Rows(Sequence[Row]):
    """Rows that are read, or looked up, when they are used."""

    def at(self, index: int) -> Row:
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self.at(one) for one in range(len(self))[index]]
        return self.at(range(len(self))[index])


class TableRows(_Rows):
    """The good rows of a table of the `datasets` library. Memory does not grow with their texts."""

    def __init__(self, table: Sequence[Any]) -> None:
        self.table = table
        self._lines = array("q")

    def append(self, row: Row) -> None:
        """Rows are added in the order of the table."""
        self._lines.append(row.line)

    def __len__(self) -> int:
        return len(self._lines)

    def at(self, index: int) -> Row:
        line = self._lines[index]
        return _parsed(line, self.table[line - 1])[0]

    def __iter__(self) -> Iterator[Row]:
        """Yields all rows in one pass over the table."""
        lines = iter(self._lines)
        good = next(lines, None)
        for line, value in enumerate(self.table, start=1):
            if line == good:
                yield _parsed(line, value)[0]
                good = next(lines, None)


class SelectedRows(_Rows):
    """Those of some rows that are at some indices."""

    def __init__(self, rows: Sequence[Row], indices: Sequence[int]) -> None:
        self._rows, self._indices = rows, indices

    def __len__(self) -> int:
        return len(self._indices)

    def at(self, index: int) -> Row:
        return self._rows[self._indices[index]]


@dataclass
class _Contents:
    """The result of one pass over a dataset's documents. Rows and prompts share their strings."""

    rows: list[Row] | TableRows = field(default_factory=list)
    sha256: str = ""
    """The hash of the rows of a hub dataset or a saved one, or of the bytes of several files; that
    of one file is computed from its bytes."""
    bad_rows: list[BadRow] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    as_json: int = 0
    """The number of rows whose answer is a number or a boolean, taken as its JSON text."""
    first_as_json: Row | None = None
    prompts: list[Prompt] = field(default_factory=list)
    bad_prompts: list[BadRow] = field(default_factory=list)

    def add(self, document: Document) -> None:
        """Adds a document as a row, as prompts, or as the reason why it is neither."""
        row = self.add_row(document)
        self.add_prompts(document, row.prompt if row else None)

    def add_row(self, document: Document) -> Row | None:
        """Adds a document as a row or as a bad one."""
        line, value, problem = document
        try:
            if problem:
                raise DataError(problem)
            row, known, as_json = _parsed(line, value)
        except DataError as error:
            self.bad_rows.append(BadRow(line, str(error)))
            return None
        self.rows.append(row)
        self.formats[known] += 1
        if as_json:
            self.as_json += 1
            self.first_as_json = self.first_as_json or row
        return row

    def add_prompts(self, document: Document, known: str | None = None) -> None:
        """Adds the prompts of a document; `known` is that of a row."""
        line, value, problem = document
        try:
            if problem:
                raise DataError(problem)
            if isinstance(value, dict) and all(key in value for key in PREPARED_KEYS):
                found = texts(value["prompts"], "prompts")
            else:
                found = [question_of(value).prompt if known is None else known]
        except DataError as error:
            self.bad_prompts.append(BadRow(line, str(error)))
        else:
            self.prompts += [Prompt(line, text) for text in found if text]


class Dataset:
    """One dataset, opened once per command.

    Nothing is read before it is needed. Then the file is read once; its hash, rows, bad rows,
    formats and prompts come from those bytes.
    """

    def __init__(self, source: Source | Path, name: str | None = None) -> None:
        self.source = DataFile(source) if isinstance(source, Path) else source
        self.name = bounded_name(name or self.source.name)
        self.file = self.source.path if isinstance(self.source, DataFile) else None
        """The file, or stream, if it is a single one."""
        self.is_stream = isinstance(self.source, DataFile) and self.source.is_stream
        self._warned = False

    @classmethod
    def at(cls, location: str) -> "Dataset":
        """Returns the dataset at a path or `hub:` id, as `location` gives it."""
        return cls(parsed_source(location))

    @classmethod
    def find(cls, name_or_file: str, root: Path, split: str = "train") -> "Dataset":
        """Returns the dataset of a name: a file, several that a pattern matches,
        `hub:owner/name[:config][@split]`, a name below `root` (see `_files_of`), a folder as if its
        parent were the root, or a bare hub id.

        Raises UsageError naming what exists.
        """
        if not name_or_file.strip():
            raise UsageError("no dataset: its name is empty; give a name or a file")
        source = parsed_source(name_or_file, split)
        if not isinstance(source, DataFile) or source.is_stream:
            return cls(source)
        path = source.path
        if problem := path_problem(path):
            raise UsageError(f"dataset '{name_or_file:.60}...': {problem}")
        if path.is_file():
            return cls(source)
        if source.suffix in SUFFIXES:
            raise UsageError(f"{source}: no such file")
        folders = [root / path] if path.name else []  # "." names a folder, but no dataset
        folders += [path.absolute()] if path.is_dir() else []
        for folder in folders:
            found = _files_of(folder.name, folder.parent, split)
            if len(found) > 1:
                files = listing([str(file) for file in found])
                raise UsageError(f"dataset '{name_or_file}' is ambiguous: give one file of {files}")
            if found:
                return cls(found[0], folder.name)
            if several := saved_dataset(folder, split) or _shards_in(folder, split):
                return cls(several, folder.name)
        if re.fullmatch(HUB_ID, name_or_file) and not path.is_dir():
            log.info("%s: no file, and no name below %s; asking the hub", name_or_file, root)
            return cls(HubDataset(name_or_file, None, split))
        raise _unknown(folders[-1].name, folders[-1].parent, split)

    def __str__(self) -> str:
        return str(self.source)

    @property
    def location(self) -> str:
        """The absolute path or hub id, from which `Dataset.at` opens the dataset anywhere."""
        return self.source.location

    @property
    def is_missing(self) -> bool:
        """Whether its file or directory is not there; the hub is not asked."""
        return self.source.is_missing

    @cached_property
    def sha256(self) -> str:
        """The hex digest of the file's bytes, or of the rows of a hub dataset or a saved one.

        Raises UsageError if the dataset is missing.
        """
        if self.file is None:
            return self._contents.sha256
        return hashlib.sha256(self._content).hexdigest()

    def rows(self, skip_bad_rows: bool = False) -> Sequence[Row]:
        """Returns all rows; with `skip_bad_rows` the good ones, and warns once about the others.

        Raises UsageError for a missing dataset or package, DataError (file:line) for bad rows.
        """
        self.check(skip_bad_rows)
        if not self._warned:
            warn_of_bad(self.source, self.bad_rows, len(self.good_rows))
            for note in self.notes:
                log.warning("%s", note)
            self._warned = True
        return self.good_rows

    def check(self, skip_bad_rows: bool = False) -> int:
        """Returns the number of good rows. Raises as `rows`, but does not warn."""
        good = len(self.good_rows)
        refuse_bad(self.source, self.bad_rows, good, skip_bad_rows)
        return good

    @property
    def good_rows(self) -> Sequence[Row]:
        """The rows that can be used. Raises as `rows` if there are none."""
        rows, bad = self._contents.rows, self._contents.bad_rows
        if not rows and not bad:
            raise DataError(f"{self.source}: no rows in it")
        if not rows:
            refuse_bad(self.source, bad, good=0)
        return rows

    @property
    def bad_rows(self) -> list[BadRow]:
        """The rows that cannot be used."""
        return self._contents.bad_rows

    @property
    def notes(self) -> list[str]:
        """What a user should know of how the rows were read, each one line."""
        contents = self._contents
        if not (first := contents.first_as_json):
            return []
        where, rows = place(self.source, first.line), len(contents.rows)
        note = (
            f"{where}: {contents.as_json} of {rows} rows have a number or a boolean as their "
            f"answer, which is taken as its JSON text ({first.response})"
        )
        return [note]

    @property
    def formats(self) -> dict[str, int]:
        """The number of good rows of each format."""
        return dict(self._contents.formats)

    def prompts(self, skip_bad_rows: bool = False, of_rows: bool = False) -> list[str]:
        """Returns all prompts; labels are not needed. A .txt file has a prompt a line, unless
        `of_rows` says that it holds rows (as training reads it). A file of `data prepare` yields
        all prompts that it has joined, in their order.

        Raises UsageError for a missing dataset, DataError (file:line) for bad rows.
        """
        prompts, bad = self._found_prompts(of_rows)
        if bad and not (skip_bad_rows and prompts):
            known = self.file is None or self.file.suffix.lower() in (*SUFFIXES, ".txt")
            hint = "" if known else " (text, a prompt a line, is a .txt)"
            raise DataError(*bad_lines(self.source, bad, hint))
        if not prompts:
            raise DataError(f"{self.source}: no prompts in it")
        return [prompt.text for prompt in prompts]

    def numbered_prompts(self, skip_bad_rows: bool = False) -> tuple[list[Prompt], int]:
        """Returns all prompts with their lines, and the number of bad rows, which raise or warn as
        in `rows`."""
        prompts, bad = self._found_prompts(of_rows=False)
        refuse_bad(self.source, bad, len(prompts), skip_bad_rows)
        warn_of_bad(self.source, bad, len(prompts))
        return prompts, len(bad)

    @property
    def has_labels(self) -> bool:
        """Whether the dataset is there and has rows with answers."""
        try:
            return bool(self._contents.rows)
        except LoragenError:
            return False

    @property
    def closed_answers(self) -> list[str] | None:
        """The distinct answers of the dataset if they are few and recur; None if they are free."""
        return closed_answers(self.good_rows)

    def release(self) -> None:
        """Frees the content. The next access reads and hashes the file again, so that hash and rows
        are always those of the same bytes."""
        for cached in ("sha256", "_content", "_contents"):
            self.__dict__.pop(cached, None)

    @cached_property
    def _content(self) -> bytes:
        assert self.file
        return read_bytes(self.file)

    @cached_property
    def _contents(self) -> _Contents:
        digest = hashlib.sha256()
        if isinstance(self.source, ArrowTable):
            table = self.source.rows()
            found = _Contents(TableRows(table))
            for document in table_documents(table, digest):
                found.add_row(document)  # its prompts are read in a pass of their own
        else:
            found = _Contents()
            documents = self.source.documents(digest)
            if self.file:  # whose bytes are read already, if they were hashed
                self.sha256  # noqa: B018  # hashed before the bytes are freed
                documents = file_documents(self.file, self._content)
            for document in documents:
                found.add(document)
        if self.file is None:
            found.sha256 = digest.hexdigest()
        elif not self._is_text:
            del self._content
        return found

    @property
    def _is_text(self) -> bool:
        """Whether the source has a prompt a line: a .txt file, or a stream without JSON in it."""
        if self.is_stream:
            return not re.match(rb"(\xef\xbb\xbf)?\s*[{[]|PAR1", self._content)
        return self.file is not None and self.file.suffix.lower() == ".txt"

    def _found_prompts(self, of_rows: bool) -> tuple[list[Prompt], list[BadRow]]:
        if self.file and not of_rows:
            if self.is_missing:
                raise UsageError(absent(self.file, "prompt file"))
            if self._is_text:
                lines = list(text_lines(self.file, self._content))
                if lines and not self.is_stream and _is_row(lines[0][1]):
                    log.warning(
                        "%s: its lines are rows in JSON, and each is read as a prompt because the "
                        "name ends in .txt; rows are in a .jsonl",
                        self.source,
                    )
                found = [Prompt(line, text.strip()) for line, text in lines if "\0" not in text]
                damaged = "holds a NUL character, which is not text"
                return found, [BadRow(line, damaged) for line, text in lines if "\0" in text]
        contents = self._contents
        if isinstance(contents.rows, TableRows) and not (contents.prompts or contents.bad_prompts):
            for document in table_documents(contents.rows.table):
                contents.add_prompts(document)
        return contents.prompts, contents.bad_prompts


def _is_row(line: str) -> bool:
    """Returns whether a line of text is a row in JSON."""
    if not line.startswith("{"):
        return False
    try:
        question_of(json.loads(line))
    except (ValueError, RecursionError, DataError):
        return False
    return True


def refuse_bad(
    source: Source, bad: Sequence[BadRow], good: int, skip_bad_rows: bool = False
) -> None:
    """Raises DataError for bad rows, unless they are to be skipped and `good` ones are left."""
    if not bad or (skip_bad_rows and good):
        return
    if not good and len({one.reason for one in bad}) == 1 < len(bad):
        line, reason = bad[0]
        raise DataError(f"{place(source, line)}: {reason} (the same in all of its {len(bad)} rows)")
    left_out = "--skip-bad-rows leaves " + ("it out" if len(bad) == 1 else "them out")
    raise DataError(*bad_lines(source, bad, f" ({left_out if good else 'no row is good'})"))


def bad_lines(source: Source, bad: Sequence[BadRow], hint: str = "") -> list[str]:
    """Returns `file:line: reason` of the first bad rows and the count of the others; `hint` is
    added to the last line."""
    lines = [f"{place(source, line)}: {reason}" for line, reason in bad[:MAX_SHOWN]]
    if len(bad) > MAX_SHOWN:
        lines.append(f"{source}: and {len(bad) - MAX_SHOWN} more bad rows")
    return [*lines[:-1], lines[-1] + hint]


def warn_of_bad(source: Source, bad: Sequence[BadRow], good: int) -> None:
    """Logs one warning that names the first bad rows, if there are any."""
    if bad:
        named = "; ".join(f"line {line}: {reason}" for line, reason in bad[:MAX_SHOWN])
        rest = f"; and {len(bad) - MAX_SHOWN} more" if len(bad) > MAX_SHOWN else ""
        total = len(bad) + good
        log.warning("%s: %d of %d rows left out: %s%s", source, len(bad), total, named, rest)


def closed_answers(rows: Sequence[Row]) -> list[str] | None:
    """Returns the distinct answers of the rows if they are few and recur; None if they are free."""
    distinct = sorted({row.response for row in rows})
    recur = len(distinct) <= min(MAX_CLOSED_ANSWERS, len(rows) // 2)
    return distinct if len(distinct) > 1 and recur else None


def allowed_answers(rows: Sequence[Row], closed: list[str] | None) -> list[list[str]] | None:
    """Returns each row's allowed answers: its own choices, else the closed set and whatever else is
    right; None if some row has neither."""
    if not all(row.choices or closed for row in rows):
        return None
    return [row.choices or list(dict.fromkeys([*(closed or ()), *row.also_right])) for row in rows]


def dataset_names(root: Path, split: str = "train") -> list[str]:
    """Returns the names of the datasets below `root` that have a file for the split."""
    entries = list(root.iterdir()) if root.is_dir() else []
    names = {
        entry.name if entry.is_dir() else DataFile(entry).name
        for entry in entries
        if entry.is_dir() or may_hold_rows(entry)
    }
    return sorted(
        name
        for name in names
        if _files_of(name, root, split)
        or (root / name / split / SAVED).is_file()
        or (split == "train" and (root / name / SAVED).is_file())
        or _shards_in(root / name, split)
    )


def _files_of(name: str, root: Path, split: str) -> list[Path]:
    """Returns the files of a dataset below the root: `<name>/<name>_<split>_formatted.jsonl` alone,
    else `<name>/<split>.*`, `<name>_<split>.*` and, for training, `<name>.*`."""
    formatted = root / name / f"{name}_{split}_formatted.jsonl"
    if formatted.is_file():
        return [formatted]
    stems = [root / name / split, root / f"{name}_{split}"]
    if split == "train":  # a file without a split is tested on only if it is named
        stems.append(root / name)
    files = (stem.parent / f"{stem.name}{suffix}" for stem in stems for suffix in SUFFIXES)
    return [file for file in files if file.is_file()]


def _shards_in(folder: Path, split: str) -> Shards | None:
    """Returns the files of a folder, or of the `data` in it, whose names differ in numbers alone:
    those that begin with the split (`train-00000-of-00002.parquet`); for training also others, if
    they are all of one name."""
    for inside in (folder, folder / "data"):
        entries = list(inside.iterdir()) if inside.is_dir() else []
        files = [f.name for f in entries if f.suffix.lower() in SUFFIXES and f.is_file()]
        names = Counter(re.sub(r"\d+", "*", glob.escape(name)) for name in files)
        of_split = [name for name in names if re.match(rf"{split}\b", name) and "*" in name]
        if split == "train" and not of_split and len(names) == 1 < names.total():
            of_split = [
                name for name in names if not re.match(r"(test|val|validation|dev)\b", name)
            ]
        if len(of_split) == 1:
            return Shards(Path(glob.escape(str(inside))) / of_split[0])
    return None


def _unknown(name: str, root: Path, split: str) -> UsageError:
    """Returns the error for a name that is not below the root; it says what is."""
    if not root.is_dir():
        return UsageError(f"dataset '{name}': {root} is not a directory; see --data-root")
    others = [f for other in SPLITS for f in _files_of(name, root, other)]
    if others:
        files = listing([str(file) for file in others])
        return UsageError(f"dataset '{name}' has no {split} split; give a file, there is {files}")
    folder = root / name
    if folder.is_dir() and (inside := sorted(file.name for file in folder.iterdir())):
        held = listing(inside)
        return UsageError(
            f"dataset '{name}': {folder} has no {split}.* and no {name}_{split}.*, but {held}; "
            "give a file of it, several as one dataset by a pattern in quotation marks "
            f"('{folder}/*.jsonl'), or --all with it as --data-root"
        )
    known = dataset_names(root, split)
    return UsageError(
        f"unknown dataset '{name}'.{did_you_mean(name, known)} In {root}: {listing(known)}"
    )
