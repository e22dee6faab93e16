"""A dataset in tokens, as training would see it: lengths, label tokens, and what is cut."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from loragen.core.data.chat import check_tokenizer, notes
from loragen.core.data.dataset import BadRow, Dataset, Row, refuse_bad
from loragen.core.data.tokenize import TokenizedRow, shared_prefix, tokenize_row
from loragen.core.errors import DataError


@dataclass(frozen=True)
class Lengths:
    """Percentiles of the tokens per row, each of which is the length of some row."""

    p5: int
    p50: int
    p95: int
    max: int


@dataclass(frozen=True)
class PreviewedRow:
    """A row as the model reads it, including special tokens."""

    line: int
    cut: str
    """The part of the prompt that does not fit: its oldest turns, and the middle of its text."""
    cut_at: int
    """The number of characters of `prompt` before that part."""
    prompt: str
    """The prompt without it."""
    answer: str
    """The part that has a loss, including the end token."""


@dataclass(frozen=True)
class Preview:
    """A dataset as training would see it."""

    source: str
    formats: dict[str, int]
    """The number of rows of each format."""
    rows: int
    bad_rows: list[BadRow]
    max_length: int
    row_tokens: Lengths
    """Whole rows, before anything is cut."""
    answer_tokens: Lengths
    rows_cut: int
    """Rows longer than `max_length`."""
    tokens_cut: int
    """The number of tokens that these rows lose in all."""
    shared_prefix: int
    """The number of tokens with which every prompt begins, once it is cut."""
    samples: list[PreviewedRow]
    warnings: list[str]
    """What is odd about the tokenizer, its chat template or special tokens in the rows."""

    def as_dict(self) -> dict[str, Any]:
        document = asdict(self)
        document["bad_rows"] = [{"line": one.line, "reason": one.reason} for one in self.bad_rows]
        for sample in document["samples"]:
            del sample["cut_at"]
        return document


def preview(tokenizer: Any, dataset: Dataset, max_length: int, samples: int) -> Preview:
    """Returns the summary of the good rows with the first `samples` of them; a row whose answer
    does not fit, or that the chat template refuses, is a bad one.

    Raises DataError if no row is good, LoragenError as `check_tokenizer`.
    """
    check_tokenizer(tokenizer)
    fitting: list[tuple[Row, TokenizedRow]] = []
    bad = list(dataset.bad_rows)
    for row in dataset.good_rows:
        try:
            fitting.append((row, tokenize_row(tokenizer, row, max_length)))
        except DataError as error:
            bad.append(BadRow(row.line, str(error)))
    bad.sort()
    parts = [part for _, part in fitting]
    if not fitting:
        refuse_bad(dataset.source, bad, good=0)
    return Preview(
        source=str(dataset),
        formats=dataset.formats,
        rows=len(fitting),
        bad_rows=bad,
        max_length=max_length,
        row_tokens=_lengths([sum(map(len, item)) for item in parts]),
        answer_tokens=_lengths([len(item.answer) for item in parts]),
        rows_cut=sum(bool(item.cut) for item in parts),
        tokens_cut=sum(len(item.cut) for item in parts),
        shared_prefix=shared_prefix([item.prompt for item in parts]),
        samples=[_previewed(tokenizer, row.line, item) for row, item in fitting[:samples]],
        warnings=[*dataset.notes, *notes(tokenizer, [row for row, _ in fitting], dataset.source)],
    )


def _previewed(tokenizer: Any, line: int, row: TokenizedRow) -> PreviewedRow:
    before, cut, after, answer = (
        tokenizer.decode(ids, skip_special_tokens=False) if ids else "" for ids in row
    )
    return PreviewedRow(line, cut, len(before), before + after, answer)


def _lengths(counts: Sequence[int]) -> Lengths:
    p5, p50, p95 = np.percentile(counts, (5, 50, 95), method="inverted_cdf")
    return Lengths(int(p5), int(p50), int(p95), max(counts))
