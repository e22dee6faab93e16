"""What training would make of a dataset: its lengths in tokens, what is learned, what is cut."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from loragen.core.data.rows import BadRow, Reading, refuse_bad
from loragen.core.data.tokenize import Parts, in_parts, shared_prefix
from loragen.core.errors import DataError


@dataclass(frozen=True)
class Lengths:
    """Tokens per row. A percentile is a length that occurs."""

    p5: int
    p50: int
    p95: int
    max: int


@dataclass(frozen=True)
class Sample:
    """A row as the model sees it, special tokens included."""

    line: int
    cut: str
    """The start of the prompt that does not fit."""
    prompt: str
    answer: str
    """What is learned, with the end token."""


@dataclass(frozen=True)
class Preview:
    source: str
    formats: dict[str, int]
    """Rows per format recognised."""
    rows: int
    bad_rows: list[BadRow]
    max_length: int
    row_tokens: Lengths
    """Whole rows, before anything is cut."""
    answer_tokens: Lengths
    rows_cut: int
    """Rows longer than `max_length`."""
    tokens_cut: int
    """Of their prompts, all together."""
    shared_prefix: int
    """Tokens with which every prompt begins, once it is cut."""
    samples: list[Sample]

    def as_dict(self) -> dict[str, Any]:
        bad = [{"line": line, "reason": reason} for line, reason in self.bad_rows]
        return {**asdict(self), "bad_rows": bad}


def preview(tokenizer: Any, reading: Reading, max_length: int, samples: int) -> Preview:
    """The good rows in tokens; a row whose answer does not fit is a bad one.

    Raises DataError where no row is good.
    """
    fitting: list[tuple[int, Parts]] = []  # with their lines
    bad = list(reading.bad)
    for row in reading.rows:
        try:
            fitting.append((row.line, in_parts(tokenizer, row, max_length)))
        except DataError as error:
            bad.append(BadRow(row.line, str(error)))
    bad.sort()
    parts = [part for _, part in fitting]
    if not fitting:
        refuse_bad(reading.source, bad, good=0)
    return Preview(
        source=str(reading.source),
        formats=reading.formats,
        rows=len(fitting),
        bad_rows=bad,
        max_length=max_length,
        row_tokens=_lengths([sum(map(len, item)) for item in parts]),
        answer_tokens=_lengths([len(item.answer) for item in parts]),
        rows_cut=sum(bool(item.cut) for item in parts),
        tokens_cut=sum(len(item.cut) for item in parts),
        shared_prefix=shared_prefix([item.prompt for item in parts]),
        samples=[_sample(tokenizer, line, item) for line, item in fitting[:samples]],
    )


def _lengths(counts: Sequence[int]) -> Lengths:
    p5, p50, p95 = np.percentile(counts, (5, 50, 95), method="inverted_cdf")
    return Lengths(int(p5), int(p50), int(p95), max(counts))


def _sample(tokenizer: Any, line: int, parts: Parts) -> Sample:
    return Sample(line, *(tokenizer.decode(part, skip_special_tokens=False) for part in parts))
