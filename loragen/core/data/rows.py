"""Rows of a dataset: prompt, response and what else they carry, from any file or hub dataset.

The answers that a dataset allows: a few that recur, or any text. Light.
"""

import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from loragen.core.data.documents import (
    HUB_ID,
    SUFFIXES,
    Document,
    HubDataset,
    Source,
    parsed_source,
    read_documents,
)
from loragen.core.data.formats import Turn, format_of
from loragen.core.errors import DataError, UsageError, did_you_mean, listing

log = logging.getLogger(__name__)

SPLITS = ("train", "test", "val")
MOST_SHOWN = 5  # bad rows, in an error or a warning


class Row(BaseModel):
    """One example. `line` is its line in the file, counted from 1."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    prompt: str
    response: str
    system: str | None = None
    history: tuple[Turn, ...] = ()
    """Earlier turns of the conversation: given, not learned."""
    choices: list[str] | None = None
    """The answers to choose between, where the dataset states them."""
    line: int


class BadRow(NamedTuple):
    line: int
    reason: str


class Reading(NamedTuple):
    """What was found in a source, the bad rows too."""

    source: Source
    rows: list[Row]
    bad: list[BadRow]
    formats: dict[str, int]
    """Names of the formats recognised, with the number of rows."""


def read(source: Source) -> Reading:
    """Everything in a source, bad rows apart.

    Raises UsageError for what is missing, DataError where no row is good.
    """
    rows: list[Row] = []
    bad: list[BadRow] = []
    formats: Counter[str] = Counter()
    for document in read_documents(source):
        try:
            name, row = _row(document)
        except DataError as error:
            bad.append(BadRow(document.line, str(error)))
        else:
            rows.append(row)
            formats[name] += 1
    if not rows and not bad:
        raise DataError(f"{source}: no rows in it")
    if not rows and len({reason for _, reason in bad}) == 1 < len(bad):
        line, reason = bad[0]
        raise DataError(f"{source}:{line}: {reason} (the same in all of its {len(bad)} rows)")
    if not rows:
        refuse_bad(source, bad, good=0)
    return Reading(source, rows, bad, dict(formats))


def read_rows(source: Source, skip_bad_rows: bool = False) -> list[Row]:
    """All rows of a source; with `skip_bad_rows` the good ones, and one warning of the others.

    Raises UsageError for what is missing, DataError (with file:line) for bad rows.
    """
    reading = read(source)
    refuse_bad(reading.source, reading.bad, len(reading.rows), skip_bad_rows)
    warn_of_bad(reading.source, reading.bad, len(reading.rows))
    return reading.rows


def check_rows(source: Source, skip_bad_rows: bool = False) -> int:
    """The number of good rows; raises as `read_rows`, and says nothing of those skipped."""
    reading = read(source)
    refuse_bad(reading.source, reading.bad, len(reading.rows), skip_bad_rows)
    return len(reading.rows)


def refuse_bad(
    source: Source, bad: Sequence[BadRow], good: int, skip_bad_rows: bool = False
) -> None:
    """Raises DataError for bad rows, unless they are to be skipped and `good` ones are left."""
    if not bad or (skip_bad_rows and good):
        return
    left_out = "--skip-bad-rows leaves " + ("it out" if len(bad) == 1 else "them out")
    raise DataError(*bad_lines(source, bad, f" ({left_out if good else 'no row is good'})"))


def bad_lines(source: Source, bad: Sequence[BadRow], hint: str = "") -> list[str]:
    """`file:line: reason` of the first bad rows, the count of the others, and at the end `hint`."""
    lines = [f"{source}:{line}: {reason}" for line, reason in bad[:MOST_SHOWN]]
    if len(bad) > MOST_SHOWN:
        lines.append(f"{source}: and {len(bad) - MOST_SHOWN} more bad rows")
    return [*lines[:-1], lines[-1] + hint]


def warn_of_bad(source: Source, bad: Sequence[BadRow], good: int) -> None:
    if bad:
        named = "; ".join(f"line {line}: {reason}" for line, reason in bad[:MOST_SHOWN])
        rest = f"; and {len(bad) - MOST_SHOWN} more" if len(bad) > MOST_SHOWN else ""
        total = len(bad) + good
        log.warning("%s: %d of %d rows left out: %s%s", source, len(bad), total, named, rest)


def _row(document: Document) -> tuple[str, Row]:
    if document.problem:
        raise DataError(document.problem)
    known = format_of(document.value)
    question, answer = known.question(document.value), known.answer(document.value)
    return known.name, Row(**question._asdict(), response=answer, line=document.line)


def find_dataset(name_or_file: str, root: Path, split: str = "train") -> tuple[str, Source]:
    """A dataset's name and where it is: a file, `hub:owner/name[:config][@split]`, a name below
    the root (see `_files_of`), a folder as if its parent were the root, or a bare hub id.

    Raises UsageError naming what exists.
    """
    if not name_or_file.strip():
        raise UsageError("no dataset: its name is empty; give a name or a file")
    source = parsed_source(name_or_file, split)
    if isinstance(source, HubDataset):
        return source.name, source
    if source.is_file():
        return _name_of(source), source
    if source.suffix.lower() in SUFFIXES:
        raise UsageError(f"{source}: no such file")
    places = [root / source] if source.name else []  # "." is a folder, and no name
    places += [source.absolute()] if source.is_dir() else []
    for place in places:
        found = _files_of(place.name, place.parent, split)
        if len(found) > 1:
            files = listing([str(file) for file in found])
            raise UsageError(f"dataset '{name_or_file}' is ambiguous: give one file of {files}")
        if found:
            return place.name, found[0]
    if re.fullmatch(HUB_ID, name_or_file) and not source.is_dir():
        log.info("%s: no file, and no name below %s; asking the hub", name_or_file, root)
        hub = HubDataset(name_or_file, None, split)
        return hub.name, hub
    raise _unknown(places[-1].name, places[-1].parent, split)


def dataset_names(root: Path, split: str = "train") -> list[str]:
    """The datasets below `root` that have a file for the split."""
    places = list(root.iterdir()) if root.is_dir() else []
    names = {place.name if place.is_dir() else _name_of(place) for place in places}
    return sorted(name for name in names if _files_of(name, root, split))


def _files_of(name: str, root: Path, split: str) -> list[Path]:
    """Where a dataset below the root may be: `<name>/<name>_<split>_formatted.jsonl` alone, else
    `<name>/<split>.*`, `<name>_<split>.*` and, for training, `<name>.*`."""
    formatted = root / name / f"{name}_{split}_formatted.jsonl"
    if formatted.is_file():
        return [formatted]
    stems = [root / name / split, root / f"{name}_{split}"]
    if split == "train":  # a file that has no split is not to be tested on unasked
        stems.append(root / name)
    files = (stem.parent / f"{stem.name}{suffix}" for stem in stems for suffix in SUFFIXES)
    return [file for file in files if file.is_file()]


def _unknown(name: str, root: Path, split: str) -> UsageError:
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
            "give a file of it, or --all with it as --data-root"
        )
    known = dataset_names(root, split)
    return UsageError(
        f"unknown dataset '{name}'.{did_you_mean(name, known)} In {root}: {listing(known)}"
    )


def _name_of(file: Path) -> str:
    """`arc_train_formatted.jsonl` -> arc; `color-word/train.jsonl` -> color-word."""
    stem = file.stem.removesuffix("_formatted")
    for split in SPLITS:
        stem = stem.removesuffix(f"_{split}")
    return file.absolute().parent.name if stem in SPLITS else stem


MOST_CLOSED_ANSWERS = 16  # a dataset with no more distinct responses has a closed answer set


def closed_answers(rows: Sequence[Row]) -> list[str] | None:
    """The answers of the whole dataset where they are few and recur; None where they are free."""
    distinct = sorted({row.response for row in rows})
    recur = len(distinct) <= min(MOST_CLOSED_ANSWERS, len(rows) // 2)
    return distinct if len(distinct) > 1 and recur else None


def allowed_answers(rows: Sequence[Row], closed: list[str] | None) -> list[list[str]] | None:
    """What each row may be answered with: its own choices, else the closed set; None where some
    row has neither."""
    allowed = [row.choices or closed or [] for row in rows]
    return allowed if all(allowed) else None
