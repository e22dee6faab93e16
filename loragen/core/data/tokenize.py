"""Rows as token ids and their label tokens, cut to a length."""

import hashlib
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from copy import copy
from heapq import nlargest
from typing import Any, NamedTuple, overload

from loragen.core.data.chat import (
    answer_ids,
    check_embeddings,
    check_tokenizer,
    messages_of,
    prompt_ids,
    rendered,
    state_of,
    template_of,
)
from loragen.core.data.dataset import BadRow, Dataset, Row, SelectedRows, refuse_bad, warn_of_bad
from loragen.core.data.documents import Source, place
from loragen.core.data.formats import Turn
from loragen.core.errors import DataError

MAX_CACHED = 16_384
"""Rows that stay in tokens in each process: some 150 MiB where a row has 300 tokens."""
UNLIMITED = 2**62
REFUSES = "raise_exception"
"""The function by which a chat template refuses a conversation."""
OTHER_TEXT = "\ue000"
"""A text that no prompt begins or ends with."""


class Example(NamedTuple):
    """One row in tokens. The loss mask covers the last `num_label_tokens` of its `ids`."""

    ids: list[int]
    """The tokens of the prompt and the answer, and the end token."""
    num_label_tokens: int
    """The number of tokens of the answer, including the end token."""


class TokenizedRow(NamedTuple):
    """One row in tokens, cut to the maximal length."""

    before: list[int]
    """The prompt up to the part that is cut; all of it if nothing is."""
    cut: list[int]
    """The part of the prompt that does not fit: its oldest turns, and the middle of its text."""
    after: list[int]
    """The prompt after that part."""
    answer: list[int]
    """The tokens of the answer and the end token."""

    @property
    def prompt(self) -> list[int]:
        """The prompt without the part that is cut."""
        return [*self.before, *self.after]

    @property
    def example(self) -> Example:
        """The row without the part that is cut, as training reads it."""
        return Example([*self.prompt, *self.answer], len(self.answer))


def tokenize_row(tokenizer: Any, row: Row, max_length: int) -> TokenizedRow:
    """Returns a row in tokens. One that is too long loses its oldest turns, and then the middle of
    its prompt's text; never its answer, its system text or the chat template's own tokens.

    Raises DataError if these alone do not fit, if the chat template refuses the row, or if the base
    has no embedding for one of its tokens.
    """
    answer = answer_ids(tokenizer, row.response)
    room = max_length - len(answer)
    if room <= 0:
        raise DataError(_too_long(answer, max_length))

    def prompt_with(history: Sequence[Turn]) -> list[int]:
        return prompt_ids(tokenizer, row.prompt, row.system, history)

    whole = prompt = prompt_with(row.history)
    check_embeddings(tokenizer, [*whole, *answer])
    if len(whole) <= room:
        return TokenizedRow(whole, [], [], answer)
    turns = len(row.history)
    if turns:
        fits = bisect_left(
            range(1, turns), True, key=lambda n: len(prompt_with(row.history[n:])) <= room
        )
        prompt = prompt_with(row.history[1 + fits :])
    start = shared_prefix([whole, prompt])
    turns_cut = whole[start : start + len(whole) - len(prompt)]
    if len(prompt) <= room:
        return TokenizedRow(prompt[:start], turns_cut, prompt[start:], answer)
    # The same conversation with another text shows which tokens are not the text's.
    frame = prompt_ids(tokenizer, OTHER_TEXT, row.system)
    start = shared_prefix([prompt, frame])
    backwards = shared_prefix([prompt[::-1], frame[::-1]])
    stop = len(prompt) - min(backwards, len(prompt) - start, len(frame) - start)
    kept = room - (len(prompt) - (stop - start))
    if kept < 1:
        fixed = len(prompt) - (stop - start)
        raise DataError(
            f"the system text and the chat template's tokens ({fixed}) and the answer "
            f"({len(answer)}) leave no room for the prompt, data.max_length is {max_length}"
        )
    first, last = start + (kept + 1) // 2, stop - kept // 2
    return TokenizedRow(prompt[:first], [*turns_cut, *prompt[first:last]], prompt[last:], answer)


class TokenizedRows(Sequence[Example]):
    """The rows that can be tokenised within `max_length`, each tokenised when it is used.

    `rows` are those rows, and `left_out` the others. For this distinction only rows whose answer or
    system text is long in characters are tokenised, and one row of each kind of conversation; but
    all rows if the chat template may refuse a text, or the tokenizer has tokens that the base has
    no embedding for. The newest `MAX_CACHED` rows are kept in tokens, so that memory
    does not grow with the dataset's tokens.
    """

    def __init__(
        self, rows: Sequence[Row], tokenizer: Any, max_length: int, source: Source | str = "line"
    ) -> None:
        """`source` is where the rows are from, for errors. Raises LoragenError as
        `check_tokenizer`."""
        self.left_out: list[BadRow] = []
        self._tokenizer, self._max_length, self._source = tokenizer, max_length, source
        check = _RowCheck(tokenizer, max_length)
        fitting = array("q")
        for index, row in enumerate(rows):
            try:
                check(row)
            except DataError as error:
                self.left_out.append(BadRow(row.line, str(error)))
            else:
                fitting.append(index)
        self._all, self._indices = rows, fitting
        self.rows = SelectedRows(rows, fitting)
        self._cache: dict[int, tuple[Example, bool]] = {}  # with whether its prompt was cut

    def subset(self, indices: Sequence[int]) -> "TokenizedRows":
        """Returns some of the rows, in that order; all subsets share what is tokenised."""
        part = copy(self)
        part._indices = array("q", (self._indices[index] for index in indices))
        part.rows = SelectedRows(self._all, part._indices)
        return part

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        """Returns examples. Raises DataError for a row that cannot be tokenised after all."""
        if isinstance(index, slice):
            return [self[one] for one in range(len(self))[index]]
        return self._tokenized(index)[0]

    def is_cut(self, index: int) -> bool:
        """Returns whether a row loses a part of its prompt."""
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
            try:
                row = tokenize_row(self._tokenizer, self._all[own], self._max_length)
            except DataError as error:
                where = place(self._source, self._all[own].line)
                raise DataError(f"{where}: {error}") from error
            if len(self._cache) >= MAX_CACHED:
                del self._cache[next(iter(self._cache))]  # the oldest
            self._cache[own] = row.example, bool(row.cut)
        return self._cache[own]


def fitting_rows(
    tokenizer: Any, dataset: Dataset, rows: Sequence[Row], skip_bad_rows: bool, max_length: int
) -> TokenizedRows:
    """Returns the rows of a dataset that can be tokenised within `max_length`.

    Raises DataError (file:line) for others unless they are to be skipped, which is warned of, and
    LoragenError as `check_tokenizer`.
    """
    found = TokenizedRows(rows, tokenizer, max_length, dataset.source)
    refuse_bad(dataset.source, found.left_out, len(found), skip_bad_rows)
    warn_of_bad(dataset.source, found.left_out, len(found))
    return found


def usable_rows(
    tokenizer: Any, dataset: Dataset, rows: Sequence[Row], skip_bad_rows: bool = False
) -> list[Row]:
    """Returns the rows that can be tokenised, for an evaluation, which cuts none; raises as
    `fitting_rows`."""
    return list(fitting_rows(tokenizer, dataset, rows, skip_bad_rows, UNLIMITED).rows)


class _RowCheck:
    """Refuses the rows that `tokenize_row` would refuse, and tokenises few of the others."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        known = state_of(tokenizer).embeddings
        self.lacks_embeddings = known is not None and len(tokenizer) > known
        self.refuses = REFUSES in template_of(tokenizer)  # a text, perhaps, so each one is rendered
        self.accepted: set[tuple[Any, ...]] = set()
        """The kinds of conversation that the chat template is known to accept."""
        self.frames: dict[str | None, int] = {}
        """System text -> the tokens of a prompt with it, but for the prompt's own text."""
        if (frame := check_tokenizer(tokenizer).frame) is not None:
            self.frames[None] = frame
            self.accepted.add((False, 0, True))

    def __call__(self, row: Row) -> None:
        """Raises DataError if the row cannot be tokenised."""
        if self.lacks_embeddings:
            tokenize_row(self.tokenizer, row, self.max_length)
            return
        kind = bool(row.system), len(row.history), bool(row.prompt.strip())
        if template_of(self.tokenizer) and (self.refuses or kind not in self.accepted):
            rendered(self.tokenizer, messages_of(row.prompt, row.system, row.history), True)
            self.accepted.add(kind)
        answer = 1 + _most_tokens(row.response)  # with the end token
        if answer >= self.max_length:
            ids = answer_ids(self.tokenizer, row.response)
            answer = len(ids)
            if answer >= self.max_length:
                raise DataError(_too_long(ids, self.max_length))
        around = self._frame("x" if row.system else None)
        if row.system and answer + around + _most_tokens(row.system) >= self.max_length:
            around = self._frame(row.system)
        if answer + around >= self.max_length:
            tokenize_row(self.tokenizer, row, self.max_length)

    def _frame(self, system: str | None) -> int:
        if system not in self.frames:
            self.frames[system] = len(prompt_ids(self.tokenizer, OTHER_TEXT, system))
        return self.frames[system]


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
