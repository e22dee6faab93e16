"""Rows of a dataset: prompt, response and perhaps a system text, from a JSONL or JSON file."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from loragen.core.errors import DataError, UsageError, did_you_mean, listing


class Row(BaseModel):
    """One example. `line` is its line in the file, counted from 1."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    prompt: str
    response: str
    system: str | None = None
    choices: list[str] | None = None
    """The answers to choose between, where the dataset states them."""
    line: int


def read_rows(file: Path) -> list[Row]:
    """All rows of a file.

    Raises UsageError for a missing file, DataError (with file:line) for one that is malformed.
    """
    rows = [_row(file, line, document) for line, document in read_documents(file)]
    if not rows:
        raise DataError(f"{file}: no rows in it")
    return rows


def find_dataset(name_or_file: str, root: Path, split: str = "train") -> tuple[str, Path]:
    """A dataset's name and file: a path as it stands, or below the root
    `<name>/<name>_<split>_formatted.jsonl`.

    Raises UsageError naming what exists.
    """
    file = Path(name_or_file)
    if file.is_file():
        return _name_of(file), file
    if file.suffix in {".jsonl", ".json"}:
        raise UsageError(f"{file}: no such file")
    found = root / name_or_file / f"{name_or_file}_{split}_formatted.jsonl"
    if found.is_file():
        return name_or_file, found
    known = dataset_names(root, split)
    if not root.is_dir():
        raise UsageError(f"dataset '{name_or_file}': {root} is not a directory; see --data-root")
    raise UsageError(
        f"unknown dataset '{name_or_file}'.{did_you_mean(name_or_file, known)} "
        f"In {root}: {listing(known)}"
    )


def dataset_names(root: Path, split: str = "train") -> list[str]:
    """The datasets below `root` that have a file for the split."""
    pattern = f"*/*_{split}_formatted.jsonl"
    found = (f for f in root.glob(pattern) if f.name == f"{f.parent.name}_{split}_formatted.jsonl")
    return sorted(file.parent.name for file in found)


def _name_of(file: Path) -> str:
    """`arc_train_formatted.jsonl` -> arc; `color-word/train.jsonl` -> color-word."""
    stem = file.stem.removesuffix("_formatted")
    for split in ("train", "test", "val"):
        stem = stem.removesuffix(f"_{split}")
    return file.absolute().parent.name if stem in {"train", "test", "val"} else stem


def read_documents(file: Path) -> Iterator[tuple[int, Any]]:
    """(line, JSON value) of a JSONL file; of a JSON list, (index from 1, item)."""
    if not file.is_file():
        raise UsageError(f"{file}: no such file")
    text = utf8_text(file)
    if file.suffix == ".json":
        yield from enumerate(_json_list(file, text), start=1)
        return
    for line, content in enumerate(text.split("\n"), start=1):
        if content.strip():
            try:
                yield line, json.loads(content)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{file}:{line}: not JSON: {error.msg} at column {error.colno}"
                ) from None


def utf8_text(file: Path) -> str:
    """The text of a file, without a byte order mark. Raises DataError where it is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def _json_list(file: Path, text: str) -> list[Any]:
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}:{error.lineno}: not JSON: {error.msg}") from None
    if not isinstance(document, list):
        raise DataError(f"{file}:1: expected a list of rows, found {type(document).__name__}")
    return document


def _row(file: Path, line: int, document: Any) -> Row:
    if not isinstance(document, dict):
        raise DataError(f"{file}:{line}: expected an object, found {type(document).__name__}")
    try:
        row = Row.model_validate({**document, "line": line})
    except ValidationError as error:
        detail = error.errors()[0]
        key = ".".join(map(str, detail["loc"]))
        known = f" (keys here: {listing(list(document))})" if detail["type"] == "missing" else ""
        raise DataError(f"{file}:{line}: '{key}': {detail['msg'].lower()}{known}") from None
    if not row.response.strip():
        raise DataError(f"{file}:{line}: 'response' is empty: there is nothing to learn")
    return row
