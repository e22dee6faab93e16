"""Rows as token ids, through the tokenizer's chat template if it has one, and their label tokens.

`preview` summarises a dataset in tokens: lengths, label tokens, and the prompts that are cut.
"""

import hashlib
import json
import logging
import re
import unicodedata
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import asdict, dataclass, field
from datetime import datetime
from heapq import nlargest
from typing import Any, NamedTuple, overload

import numpy as np

from loragen.core.data.dataset import BadRow, Dataset, Row, refuse_bad, warn_of_bad
from loragen.core.data.formats import Turn
from loragen.core.errors import DataError, LoragenError

log = logging.getLogger(__name__)

MAX_CACHED = 16_384
"""Rows that stay in tokens in each process: some 150 MiB where a row has 300 tokens."""


MAX_TEMPLATE_TEXT = 1_000_000
"""The most characters that a chat template may add to a conversation."""
UNLIMITED = 2**62
CLOCK = "strftime_now"
"""The function by which a chat template asks for the date."""
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


# ---------------------------------------------------------------------------- the tokenizer


class Ending(NamedTuple):
    """How answers end, and what is odd about the chat template around them."""

    end: int | None
    """The token that ends an answer: the one that the chat template writes after a turn of the
    assistant if that is a single token, else the tokenizer's end token."""
    notes: tuple[str, ...] = ()
    """What a user should know, each one line."""
    frame: int | None = None
    """The number of tokens of a short prompt without a system text, if the chat template accepts
    one."""


@dataclass
class _State:
    """What is known of a tokenizer beside its files. It is an attribute of the tokenizer, so that
    all who use that one render alike."""

    date: datetime = field(default_factory=lambda: datetime.now().replace(microsecond=0))
    """The date that chat templates may write."""
    embeddings: int | None = None
    """The number of tokens that the base has embeddings for; None: not known."""
    endings: dict[tuple[Any, ...], Ending] = field(default_factory=dict)
    """By everything that the ending depends on."""
    special: re.Pattern[str] | None = None
    """A pattern that finds special tokens in a text."""
    trailing: int | None = None
    """The number of tokens that the tokenizer adds behind every text by itself."""
    said: set[str] = field(default_factory=set)
    """The notes that have been logged already."""


def _state(tokenizer: Any) -> _State:
    state: _State | None = getattr(tokenizer, "loragen_state", None)
    if state is None:
        state = tokenizer.loragen_state = _State()
    return state


def set_embeddings(tokenizer: Any, count: int) -> None:
    """Tells a tokenizer for how many tokens its base has embeddings."""
    _state(tokenizer).embeddings = count


def set_chat_date(tokenizer: Any, recorded: str = "") -> None:
    """Sets the date that the chat template writes, if it writes one: the one `recorded` in a
    manifest (ISO 8601, local time), else now."""
    now = datetime.now().replace(microsecond=0)
    found = datetime.fromisoformat(recorded) if recorded else now
    _state(tokenizer).date = found.astimezone().replace(tzinfo=None) if found.tzinfo else found


def chat_date(tokenizer: Any) -> str:
    """Returns the date that the chat template writes, for a manifest; empty if it writes none."""
    dated = CLOCK in _template(tokenizer)
    return _state(tokenizer).date.isoformat() if dated else ""


def _template(tokenizer: Any) -> str:
    found = getattr(tokenizer, "chat_template", None) or ""
    return found if isinstance(found, str) else str(found.get("default", found))


def _dated(template: str, date: datetime) -> str:
    """Returns a template that writes this date, whenever it is rendered. transformers passes no
    functions to a template, so the date is a macro of the same name on a line before it."""
    values = {"%%": "\0"}
    for letter in "aAbBcCdDeFgGhHIjklmMpPrRsSTuUVwWxXyYzZ":
        with suppress(ValueError):  # not every system knows all of them
            values[f"%{letter}"] = date.strftime(f"%{letter}")
            values[f"%-{letter}"] = values[f"%{letter}"].lstrip("0 ") or "0"
    values["\0"] = "%"
    literals = ((json.dumps(a), json.dumps(b)) for a, b in values.items())
    replaced = "".join(f" | replace({a}, {b})" for a, b in literals)
    return f"{{% macro {CLOCK}(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n{template}"


def _rendered(tokenizer: Any, messages: list[dict[str, str]], prompts: bool) -> str:
    """Returns the text of a conversation; with `prompts` it ends with the header of an answer.

    Raises LoragenError if the chat template is broken, DataError if it refuses the conversation.
    """
    from jinja2 import TemplateSyntaxError

    template, options, shift = _template(tokenizer), {}, 0
    if CLOCK in template:
        options, shift = {"chat_template": _dated(template, _state(tokenizer).date)}, 1
    try:
        text: str = tokenizer.apply_chat_template(
            messages, add_generation_prompt=prompts, tokenize=False, **options
        )
    except TemplateSyntaxError as error:
        line = (error.lineno or 1) - shift
        raise LoragenError(
            f"{_name(tokenizer)}its chat template is not valid: line {line}: {error.message}"
        ) from None
    except ImportError:
        raise
    except Exception as error:  # a template is a program, and may fail in any way
        raise DataError(f"the chat template refuses it: {_reason(error)}") from error
    own = len(text) - sum(len(message["content"]) for message in messages)
    if own > MAX_TEMPLATE_TEXT:
        raise DataError(f"the chat template writes {own:,} characters around it")
    return text


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no reason given"
    return text if type(error).__name__ == "TemplateError" else f"{type(error).__name__}: {text}"


def _name(tokenizer: Any) -> str:
    """Returns the start of a message about the tokenizer."""
    return f"tokenizer of {name}: " if (name := getattr(tokenizer, "name_or_path", "")) else ""


def check_tokenizer(tokenizer: Any) -> Ending:
    """Returns how answers end.

    Raises LoragenError if the tokenizer has no end token or its chat template is not valid.
    """
    found = _ending(tokenizer)
    if tokenizer.eos_token_id is None or found.end is None:
        token = getattr(tokenizer, "eos_token", None)
        problem = (
            f"eos_token {token!r} is not in its vocabulary" if token else "it has no eos_token"
        )
        ends = found.end is not None and f", such as {tokenizer.decode([found.end])!r}"
        raise LoragenError(
            f"{_name(tokenizer)}{problem}, so that no answer could end; set eos_token in "
            f"tokenizer_config.json to the token that ends an answer{ends or ''}"
        )
    return found


def _ending(tokenizer: Any) -> Ending:
    eos = tokenizer.eos_token_id
    if not _template(tokenizer):
        return Ending(eos)
    state = _state(tokenizer)
    key = (_template(tokenizer), eos, state.date if chat_date(tokenizer) else None)
    if key not in state.endings:
        state.endings[key] = _look_at_template(tokenizer)
    return state.endings[key]


def _look_at_template(tokenizer: Any) -> Ending:
    """Renders a short conversation, and compares what stands around the answer in it with the
    prompt of that answer and with the end token."""
    eos, answer = tokenizer.eos_token_id, "an answer"
    problem = ""
    for system in (None, "Be short."):  # some templates demand a system text
        messages = _messages("?", system, ())
        answered = [*messages, {"role": "assistant", "content": answer}]
        try:
            asked = _rendered(tokenizer, messages, False)
            prompt = _rendered(tokenizer, messages, True)
            before, found, after = _rendered(tokenizer, answered, False).rpartition(answer)
            break
        except DataError as error:
            problem = problem or f"{error} (a question and its answer)"
    else:
        return Ending(eos, (problem,))
    notes, end = [], eos
    if not found:
        notes.append("the chat template changes the text of an answer, or leaves it out")
    ids = tokenizer(after.strip(), add_special_tokens=False)["input_ids"] if after.strip() else []
    if ids and ids[0] in tokenizer.added_tokens_decoder:
        end = ids[0]
        if end != eos:
            notes.append(
                f"answers end with {tokenizer.decode([end])!r}, as in the chat template; "
                f"eos_token is {tokenizer.eos_token!r}: software that stops at that one alone "
                "has to be told"
            )
    elif ids:
        notes.append(
            f"the chat template ends an answer with {after.strip()!r}, which is no single token; "
            f"answers end with eos_token, {tokenizer.eos_token!r}"
        )
    if found and prompt.startswith(asked) and before.startswith(asked):
        header, own = prompt[len(asked) :].strip(), before[len(asked) :].strip()
        if not header and own:
            notes.append(
                f"the chat template has no generation prompt: answers are learned and generated "
                f"without the {own!r} that stands before an answer in a conversation"
            )
        elif header != own:
            notes.append(
                f"the chat template ends a prompt with {header!r}, and has {own!r} before the "
                "answers of a conversation; answers are learned after the first"
            )
    frame = None if system else len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    return Ending(end, tuple(notes), frame)


def end_ids(tokenizer: Any) -> list[int]:
    """Returns the tokens that end an answer: the tokenizer's end token, and the one that the chat
    template writes after an answer, which may be another one."""
    return sorted(
        {one for one in (tokenizer.eos_token_id, _ending(tokenizer).end) if one is not None}
    )


def pad_id(tokenizer: Any) -> int:
    """Returns the id of the padding token, or of the end token if there is none that the base has
    an embedding for. Padding is masked, so that any id would do. Raises as `check_tokenizer`."""
    pad, known = tokenizer.pad_token_id, _state(tokenizer).embeddings
    if pad is not None and (known is None or pad < known):
        return int(pad)
    check_tokenizer(tokenizer)
    return int(tokenizer.eos_token_id)


def special_tokens(tokenizer: Any, text: str) -> list[str]:
    """Returns the special tokens that a text holds, which the model would not read as text."""
    state = _state(tokenizer)
    if state.special is None:
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        tokens = {str(one) for one in added if one.special and str(one).strip()}
        longest_first = sorted(tokens, key=lambda one: (-len(one), one))
        state.special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
    return state.special.findall(text)


# ---------------------------------------------------------------------------- rows


def prompt_ids(
    tokenizer: Any, prompt: str, system: str | None = None, history: Sequence[Turn] = ()
) -> list[int]:
    """Returns the tokens before the answer; `history` are the turns before the prompt.

    Raises DataError if the chat template refuses the conversation.
    """
    if _template(tokenizer):
        text = _rendered(tokenizer, _messages(prompt, system, history), True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    parts = [*([system] if system else []), *(text for turn in history for text in turn), prompt]
    ids = list(tokenizer("".join(f"{part}\n" for part in parts))["input_ids"])
    return ids[: len(ids) - _num_trailing(tokenizer)]


def _messages(prompt: str, system: str | None, history: Sequence[Turn]) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": system}] if system else []
    for turn in history:
        messages.append({"role": "user", "content": turn.prompt})
        messages.append({"role": "assistant", "content": turn.response})
    return [*messages, {"role": "user", "content": prompt}]


def _num_trailing(tokenizer: Any) -> int:
    """Returns the number of tokens that the tokenizer adds behind every text by itself: an end
    token there would stand between prompt and answer."""
    state = _state(tokenizer)
    if state.trailing is None:
        whole = list(tokenizer("a")["input_ids"])
        bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        starts = range(len(whole) - len(bare) + 1)
        start = next((i for i in starts if whole[i : i + len(bare)] == bare), None)
        state.trailing = 0 if start is None else len(whole) - start - len(bare)
    return state.trailing


def answer_ids(tokenizer: Any, response: str) -> list[int]:
    """Returns the answer's tokens and the end token, which is trained too to end the decoding; one
    that the response itself ends with is not repeated.

    Raises LoragenError if the tokenizer has no end token.
    """
    end = check_tokenizer(tokenizer).end
    assert end is not None
    ids = list(tokenizer(response, add_special_tokens=False)["input_ids"])
    return ids if ids[-1:] == [end] else [*ids, end]


def generated_ids(tokenizer: Any, response: str) -> list[int]:
    """Returns the tokens of an answer up to the first that ends it: nothing after that one can be
    generated."""
    ids, ends = answer_ids(tokenizer, response), end_ids(tokenizer)
    return ids[: next(i for i, one in enumerate(ids, start=1) if one in ends)]


def generated_text(tokenizer: Any, response: str) -> str:
    """Returns a response as decoding would return it: special tokens are no text."""
    if not special_tokens(tokenizer, response):
        return response
    ids = generated_ids(tokenizer, response)
    return str(tokenizer.decode(ids, skip_special_tokens=True))


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


def check_embeddings(tokenizer: Any, ids: Sequence[int]) -> None:
    """Raises DataError for a token that the base has no embedding for."""
    known = _state(tokenizer).embeddings
    if known is not None and (largest := max(ids)) >= known:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise DataError(
            f"the token {token!r} has the id {largest}, and the base has embeddings for {known} "
            "tokens: its tokenizer is another model's, or has more tokens than its weights"
        )


class TokenizedRows(Sequence[Example]):
    """The rows that can be tokenised within `max_length`, each tokenised when it is used.

    `rows` are those rows, and `left_out` the others. For this distinction only rows whose answer or
    system text is long in characters are tokenised, and one row of each kind of conversation; but
    all rows if the chat template may refuse a text, or the tokenizer has tokens that the base has
    no embedding for. The newest `MAX_CACHED` rows are kept in tokens, so that memory
    does not grow with the dataset's tokens.
    """

    def __init__(
        self, rows: Sequence[Row], tokenizer: Any, max_length: int, source: str = "line"
    ) -> None:
        """`source` is where the rows are from, for errors. Raises LoragenError as
        `check_tokenizer`."""
        self.rows: list[Row] = []
        self.left_out: list[BadRow] = []
        self._tokenizer, self._max_length, self._source = tokenizer, max_length, source
        check = _RowCheck(tokenizer, max_length)
        for row in rows:
            try:
                check(row)
            except DataError as error:
                self.left_out.append(BadRow(row.line, str(error)))
            else:
                self.rows.append(row)
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
                raise DataError(f"{self._source}:{self._all[own].line}: {error}") from error
            if len(self._cache) >= MAX_CACHED:
                del self._cache[next(iter(self._cache))]  # the oldest
            self._cache[own] = row.example, bool(row.cut)
        return self._cache[own]


def usable_rows(
    tokenizer: Any, dataset: Dataset, rows: Sequence[Row], skip_bad_rows: bool = False
) -> list[Row]:
    """Returns the rows of a dataset that can be tokenised, for an evaluation, which cuts none.

    Raises DataError (file:line) for others unless they are to be skipped, which is warned of, and
    LoragenError as `check_tokenizer`.
    """
    found = TokenizedRows(rows, tokenizer, UNLIMITED, str(dataset))
    refuse_bad(dataset.source, found.left_out, len(found), skip_bad_rows)
    warn_of_bad(dataset.source, found.left_out, len(found))
    return found.rows


class _RowCheck:
    """Refuses the rows that `tokenize_row` would refuse, and tokenises few of the others."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        known = _state(tokenizer).embeddings
        self.lacks_embeddings = known is not None and len(tokenizer) > known
        self.refuses = REFUSES in _template(tokenizer)  # a text, perhaps, so each one is rendered
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
        if _template(self.tokenizer) and (self.refuses or kind not in self.accepted):
            _rendered(self.tokenizer, _messages(row.prompt, row.system, row.history), True)
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


def notes(tokenizer: Any, rows: Sequence[Row], source: str) -> list[str]:
    """Returns what a user should know of a tokenizer, its chat template, and rows with texts that
    the model would not read, or not write, as they are; one line each.

    Raises LoragenError as `check_tokenizer`.
    """
    found = list(check_tokenizer(tokenizer).notes)
    asked, answered, changed = (
        list[tuple[int, str]](),
        list[tuple[int, str]](),
        list[tuple[int, str]](),
    )
    for row in rows:
        texts = (row.prompt, row.system or "", *(text for turn in row.history for text in turn))
        if tokens := special_tokens(tokenizer, "\n".join(texts)):
            asked.append((row.line, repr(tokens[0])))
        if tokens := special_tokens(tokenizer, row.response):
            answered.append((row.line, repr(tokens[0])))
            continue
        ids = tokenizer(row.response, add_special_tokens=False)["input_ids"]
        back = tokenizer.decode(ids, skip_special_tokens=True)
        if _bare(back) != _bare(row.response):
            changed.append((row.line, f"{row.response[:40]!r} becomes {back[:40]!r}"))
    for odd, what in (
        (asked, "a special token in the prompt, which the model reads as its own mark"),
        (answered, "a special token in the response, which no answer can have as text"),
        (changed, "a response that the tokenizer cannot represent"),
    ):
        if odd:
            line, example = odd[0]
            found.append(f"{source}:{line}: {len(odd)} of {len(rows)} rows have {what} ({example})")
    return found


def _bare(text: str) -> str:
    """Returns a text as answers are compared, and without white space, which tokenizers add."""
    return "".join(unicodedata.normalize("NFKC", text).split())


def log_notes(tokenizer: Any, rows: Sequence[Row], source: str) -> None:
    """Logs the `notes` as warnings, those of the tokenizer itself once."""
    said = _state(tokenizer).said
    for note in notes(tokenizer, rows, source):
        if note not in said:
            log.warning("%s", note)
            said.add(note)


def shared_prefix(sequences: Sequence[list[int]]) -> int:
    """Returns the number of tokens with which all sequences begin."""
    first, last = min(sequences), max(sequences)  # lexicographic: these two are least alike
    pairs = enumerate(zip(first, last, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(last)))


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
        warnings=notes(tokenizer, [row for row, _ in fitting], str(dataset)),
    )


def _previewed(tokenizer: Any, line: int, row: TokenizedRow) -> PreviewedRow:
    before, cut, after, answer = (
        tokenizer.decode(ids, skip_special_tokens=False) if ids else "" for ids in row
    )
    return PreviewedRow(line, cut, len(before), before + after, answer)


def _lengths(counts: Sequence[int]) -> Lengths:
    p5, p50, p95 = np.percentile(counts, (5, 50, 95), method="inverted_cdf")
    return Lengths(int(p5), int(p50), int(p95), max(counts))
