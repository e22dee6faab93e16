"""What training would make of a dataset: its lengths in tokens, what is learned, what is cut."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from loragen.core.data.rows import BadRow, Reading, Row, refuse_bad
from loragen.core.data.tokenize import answer_ids, prompt_ids, shared_prefix


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


class _Tokens(NamedTuple):
    row: Row
    prompt: list[int]
    answer: list[int]
    cut: int
    """How many tokens of the prompt's start do not fit."""

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.answer)


def preview(tokenizer: Any, reading: Reading, max_length: int, samples: int) -> Preview:
    """The good rows in tokens; a row whose answer does not fit is a bad one.

    Raises DataError where no row is good.
    """
    found = [_tokens(tokenizer, row, max_length) for row in reading.rows]
    fitting = [item for item in found if item.cut < len(item.prompt)]
    too_long = [
        BadRow(item.row.line, f"the answer has {len(item.answer)} tokens, max_length {max_length}")
        for item in found
        if item.cut >= len(item.prompt)
    ]
    bad = sorted([*reading.bad, *too_long])
    if not fitting:
        refuse_bad(reading.source, bad, good=0)
    return Preview(
        source=str(reading.source),
        formats=reading.formats,
        rows=len(fitting),
        bad_rows=bad,
        max_length=max_length,
        row_tokens=_lengths([item.length for item in fitting]),
        answer_tokens=_lengths([len(item.answer) for item in fitting]),
        rows_cut=sum(item.cut > 0 for item in fitting),
        tokens_cut=sum(item.cut for item in fitting),
        shared_prefix=shared_prefix([item.prompt[item.cut :] for item in fitting]),
        samples=[_sample(tokenizer, item) for item in fitting[:samples]],
    )


def _tokens(tokenizer: Any, row: Row, max_length: int) -> _Tokens:
    prompt = prompt_ids(tokenizer, row.prompt, row.system, row.history)
    answer = answer_ids(tokenizer, row.response)
    return _Tokens(row, prompt, answer, max(0, len(prompt) + len(answer) - max_length))


def _lengths(counts: Sequence[int]) -> Lengths:
    p5, p50, p95 = np.percentile(counts, (5, 50, 95), method="inverted_cdf")
    return Lengths(int(p5), int(p50), int(p95), max(counts))


def _sample(tokenizer: Any, item: _Tokens) -> Sample:
    parts = (item.prompt[: item.cut], item.prompt[item.cut :], item.answer)
    texts = (tokenizer.decode(part, skip_special_tokens=False) for part in parts)
    return Sample(item.row.line, *texts)
