"""Rows -> token ids with a loss mask, through the tokenizer's chat template where it has one.

What training would make of a dataset: its lengths in tokens, what is learned, what is cut.
"""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from loragen.core.data.formats import Turn
from loragen.core.data.rows import BadRow, Reading, Row, refuse_bad
from loragen.core.errors import DataError


class Example(NamedTuple):
    """One row in tokens: `ids` ends with the answer and the end token, `answer` of them."""

    ids: list[int]
    answer: int


class Parts(NamedTuple):
    """One row in tokens, as far as it fits."""

    cut: list[int]
    """The start of the prompt that does not fit."""
    prompt: list[int]
    answer: list[int]
    """With the end token."""


def prompt_ids(
    tokenizer: Any, prompt: str, system: str | None = None, history: Sequence[Turn] = ()
) -> list[int]:
    """The tokens after which the answer begins; `history` are the turns before the prompt."""
    if tokenizer.chat_template:
        messages = [{"role": "system", "content": system}] if system else []
        for turn in history:
            messages.append({"role": "user", "content": turn.prompt})
            messages.append({"role": "assistant", "content": turn.response})
        messages.append({"role": "user", "content": prompt})
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
        return list(encoded["input_ids"] if hasattr(encoded, "keys") else encoded)
    parts = [*([system] if system else []), *(text for turn in history for text in turn), prompt]
    return list(tokenizer("".join(f"{part}\n" for part in parts))["input_ids"])


def answer_ids(tokenizer: Any, response: str) -> list[int]:
    """The answer's tokens and the end token, which is learned too: it says when to stop."""
    ids = list(tokenizer(response, add_special_tokens=False)["input_ids"])
    return [*ids, tokenizer.eos_token_id]


def in_parts(tokenizer: Any, row: Row, max_length: int) -> Parts:
    """A row that is too long loses the start of its prompt, never any of its answer.

    Raises DataError where the answer alone does not fit.
    """
    prompt = prompt_ids(tokenizer, row.prompt, row.system, row.history)
    answer = answer_ids(tokenizer, row.response)
    room = max_length - len(answer)
    if room < 1:
        raise DataError(f"the answer has {len(answer)} tokens, data.max_length is {max_length}")
    cut = max(0, len(prompt) - room)
    return Parts(prompt[:cut], prompt[cut:], answer)


def learned(parts: Parts) -> Example:
    """What is learned from: the row without what is cut."""
    return Example([*parts.prompt, *parts.answer], len(parts.answer))


def examples_hash(examples: Sequence[Example]) -> str:
    """Of the tokens and of which of them are answers, in their order: another tokenizer, chat
    template or label makes another hash."""
    digest = hashlib.sha256()
    for item in examples:
        digest.update(array("q", [item.answer, *item.ids]).tobytes())
    return digest.hexdigest()


def shared_prefix(sequences: Sequence[list[int]]) -> int:
    """With how many equal tokens all sequences begin."""
    first, last = min(sequences), max(sequences)  # in the order of words, the least alike
    pairs = enumerate(zip(first, last, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(last)))


def pad_id(tokenizer: Any) -> int:
    """The padding id; the end token's where the tokenizer has none (padding is masked anyway)."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


@dataclass(frozen=True)
class Lengths:
    """Tokens per row. A percentile is a length that occurs."""

    p5: int
    p50: int
    p95: int
    max: int


@dataclass(frozen=True)
class PreviewedRow:
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
    samples: list[PreviewedRow]

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


def _sample(tokenizer: Any, line: int, parts: Parts) -> PreviewedRow:
    return PreviewedRow(
        line, *(tokenizer.decode(part, skip_special_tokens=False) for part in parts)
    )
