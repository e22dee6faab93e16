"""Rows as token ids, through the tokenizer's chat template if it has one, and their label tokens.

`preview` summarises a dataset in tokens: lengths, label tokens, and the prompts that are cut.
"""

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from heapq import nlargest
from typing import Any, NamedTuple, overload

import numpy as np

from loragen.core.data.dataset import BadRow, Dataset, Row, refuse_bad
from loragen.core.data.formats import Turn
from loragen.core.errors import DataError

MAX_CACHED = 16_384
"""Rows that stay in tokens in each process: some 150 MiB where a row has 300 tokens."""


class Example(NamedTuple):
    """One row in tokens. The loss mask covers the last `num_label_tokens` of its `ids`."""

    ids: list[int]
    """The tokens of the prompt and the answer, and the end token."""
    num_label_tokens: int
    """The number of tokens of the answer, including the end token."""


class TokenizedRow(NamedTuple):
    """One row in tokens, cut to the maximal length."""

    cut: list[int]
    """The start of the prompt, which does not fit."""
    prompt: list[int]
    answer: list[int]
    """The tokens of the answer and the end token."""

    @property
    def example(self) -> Example:
        """The row without the part that is cut, as training reads it."""
        return Example([*self.prompt, *self.answer], len(self.answer))


def prompt_ids(
    tokenizer: Any, prompt: str, system: str | None = None, history: Sequence[Turn] = ()
) -> list[int]:
    """Returns the tokens before the answer; `history` are the turns before the prompt."""
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
    """Returns the answer's tokens and the end token, which is trained too to end the decoding."""
    ids = list(tokenizer(response, add_special_tokens=False)["input_ids"])
    return [*ids, tokenizer.eos_token_id]


def end_ids(tokenizer: Any) -> list[int]:
    """Returns the tokens that end an answer: the tokenizer's end token, and the special token that
    the chat template writes after an answer, which may be another one."""
    found = {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        answer = "an answer"
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
        after = tokenizer.apply_chat_template(messages, tokenize=False).rpartition(answer)[2]
        ids = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"]
        added = tokenizer.added_tokens_decoder
        found |= {one for one in ids[:1] if one in added and added[one].special}
    return sorted(one for one in found if one is not None)


def tokenize_row(tokenizer: Any, row: Row, max_length: int) -> TokenizedRow:
    """Returns a row in tokens. One that is too long loses the start of its prompt, never any of its
    answer.

    Raises DataError if the answer alone does not fit.
    """
    answer = answer_ids(tokenizer, row.response)
    if len(answer) >= max_length:
        raise DataError(_too_long(answer, max_length))
    room = max_length - len(answer)
    prompt = prompt_ids(tokenizer, row.prompt, row.system, row.history)
    cut = max(0, len(prompt) - room)
    return TokenizedRow(prompt[:cut], prompt[cut:], answer)


class TokenizedRows(Sequence[Example]):
    """The rows whose answer fits into `max_length`, each tokenised when it is used.

    `rows` are those rows, and `too_long` the others. Only answers that are long in characters are
    tokenised for this distinction. The newest `MAX_CACHED` rows are kept in tokens, so that memory
    does not grow with the dataset's tokens.
    """

    def __init__(self, rows: Sequence[Row], tokenizer: Any, max_length: int) -> None:
        self.rows: list[Row] = []
        self.too_long: list[BadRow] = []
        self._tokenizer, self._max_length = tokenizer, max_length
        for row in rows:
            answer: Sequence[int] = ()
            if _most_tokens(row.response) + 1 >= max_length:  # with the end token
                answer = answer_ids(tokenizer, row.response)
            if len(answer) < max_length:
                self.rows.append(row)
            else:
                self.too_long.append(BadRow(row.line, _too_long(answer, max_length)))
        self._all = self.rows
        self._indices: Sequence[int] = range(len(self.rows))  # of `rows` in `_all`
        self._cache: dict[int, tuple[Example, bool]] = {}  # with whether its prompt was cut

    def subset(self, indices: Sequence[int]) -> "TokenizedRows":
        """Returns some of the rows, in that order; all subsets share what is tokenised."""
        part = copy(self)
        part._indices = [self._indices[index] for index in indices]
        part.rows = [self.rows[index] for index in indices]
        return part

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        """Returns examples. Raises DataError if an answer does not fit after all."""
        if isinstance(index, slice):
            return [self[one] for one in range(len(self))[index]]
        return self._tokenized(index)[0]

    def is_cut(self, index: int) -> bool:
        """Returns whether a row loses the start of its prompt."""
        return self._tokenized(index)[1]

    def longest(self, indices: Iterable[int], count: int) -> list[int]:
        """Returns those `count` of the indices whose rows have the most characters: nothing is
        tokenised for it."""

        def characters(index: int) -> int:
            row = self.rows[index]
            turns = sum(len(text) for turn in row.history for text in turn)
            return len(row.prompt) + len(row.response) + len(row.system or "") + turns

        return nlargest(count, indices, key=characters)

    def _tokenized(self, index: int) -> tuple[Example, bool]:
        own = self._indices[index]
        if own not in self._cache:
            row = tokenize_row(self._tokenizer, self._all[own], self._max_length)
            if len(self._cache) >= MAX_CACHED:
                del self._cache[next(iter(self._cache))]  # the oldest
            self._cache[own] = row.example, bool(row.cut)
        return self._cache[own]


def _too_long(answer: Sequence[int], max_length: int) -> str:
    return f"the answer has {len(answer)} tokens, data.max_length is {max_length}"


def _most_tokens(text: str) -> int:
    """Returns an upper bound of the tokens of a text: one for each UTF-8 byte and one before the
    first. Normalisation (NFKC) turns a character that is not ASCII into up to 33 bytes."""
    return 1 + (len(text) if text.isascii() else 33 * len(text))


def examples_hash(examples: Iterable[Example]) -> str:
    """Returns a hash of the tokens and of the numbers of label tokens, in their order. It changes
    with the tokenizer, the chat template and the labels."""
    digest = hashlib.sha256()
    for item in examples:
        digest.update(array("q", [item.num_label_tokens, *item.ids]).tobytes())
    return digest.hexdigest()


def shared_prefix(sequences: Sequence[list[int]]) -> int:
    """Returns the number of tokens with which all sequences begin."""
    first, last = min(sequences), max(sequences)  # lexicographic: these two are least alike
    pairs = enumerate(zip(first, last, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(last)))


def pad_id(tokenizer: Any) -> int:
    """Returns the id of the padding token, or of the end token if there is none. Padding is masked,
    so that any id would do."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


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
    """The start of the prompt that does not fit."""
    prompt: str
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

    def as_dict(self) -> dict[str, Any]:
        bad = [{"line": line, "reason": reason} for line, reason in self.bad_rows]
        return {**asdict(self), "bad_rows": bad}


def preview(tokenizer: Any, dataset: Dataset, max_length: int, samples: int) -> Preview:
    """Returns the summary of the good rows with the first `samples` of them; a row whose answer
    does not fit is a bad one.

    Raises DataError if no row is good.
    """
    fitting: list[tuple[int, TokenizedRow]] = []  # with their lines
    bad = list(dataset.bad_rows)
    for row in dataset.good_rows:
        try:
            fitting.append((row.line, tokenize_row(tokenizer, row, max_length)))
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
        samples=[
            PreviewedRow(line, *(tokenizer.decode(ids, skip_special_tokens=False) for ids in item))
            for line, item in fitting[:samples]
        ],
    )


def _lengths(counts: Sequence[int]) -> Lengths:
    p5, p50, p95 = np.percentile(counts, (5, 50, 95), method="inverted_cdf")
    return Lengths(int(p5), int(p50), int(p95), max(counts))
