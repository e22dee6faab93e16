"""Deprecated: what `core.data.dataset` offers, under the names of before."""

from typing import NamedTuple

from loragen.core.data.dataset import (
    BadRow,
    Dataset,
    Row,
    allowed_answers,
    bad_lines,
    closed_answers,
    dataset_names,
    find_dataset,
    refuse_bad,
    warn_of_bad,
)
from loragen.core.data.documents import Source

__all__ = [
    "BadRow",
    "Row",
    "allowed_answers",
    "bad_lines",
    "closed_answers",
    "dataset_names",
    "find_dataset",
    "refuse_bad",
    "warn_of_bad",
]


class Reading(NamedTuple):
    source: Source
    rows: list[Row]
    bad: list[BadRow]
    formats: dict[str, int]


def read(source: Source) -> Reading:
    dataset = Dataset(source)
    return Reading(source, dataset.good_rows, dataset.bad_rows, dataset.formats)


def read_rows(source: Source, skip_bad_rows: bool = False) -> list[Row]:
    return Dataset(source).rows(skip_bad_rows)


def check_rows(source: Source, skip_bad_rows: bool = False) -> int:
    return Dataset(source).check(skip_bad_rows)
