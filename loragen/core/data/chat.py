"""A tokenizer with its chat template: conversations as tokens, and how answers end.

Training, evaluation and generation render through these functions, so that they render alike.
"""

import json
import re
import sys
import time
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import datetime
from logging import getLogger
from typing import Any, NamedTuple

from loragen.core.data.dataset import Row
from loragen.core.data.documents import Source, place
from loragen.core.data.formats import Turn
from loragen.core.errors import DataError, LoragenError

log = getLogger(__name__)

CLOCK = "strftime_now"
"""The function by which a chat template asks for the date."""
MAX_TEMPLATE_TEXT = 1_000_000
"""The most characters that a chat template may add to a conversation."""
MAX_TEMPLATE_SECONDS = 10.0
"""The most processor time that a chat template may take for one conversation. Real ones take a few
milliseconds."""
WATCHED = 8
"""The number of conversations, the first of a tokenizer, in which that is watched."""


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
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """What the chat template is given beside the conversation."""
    embeddings: int | None = None
    """The number of tokens that the base has embeddings for; None: not known."""
    endings: dict[tuple[Any, ...], Ending] = field(default_factory=dict)
    """By everything that the ending depends on."""
    special: re.Pattern[str] | None = None
    """A pattern that finds special tokens in a text."""
    trailing: int | None = None
    """The number of tokens that the tokenizer adds behind every text by itself."""
    rendered: int = 0
    """The number of conversations that have been rendered."""
    said: set[str] = field(default_factory=set)
    """The notes that have been logged already."""


def state_of(tokenizer: Any) -> _State:
    state: _State | None = getattr(tokenizer, "loragen_state", None)
    if state is None:
        state = tokenizer.loragen_state = _State()
    return state


def set_chat_date(tokenizer: Any, recorded: str = "") -> None:
    """Sets the date that the chat template writes, if it writes one: the one `recorded` in a
    manifest (ISO 8601, local time), else now."""
    now = datetime.now().replace(microsecond=0)
    found = datetime.fromisoformat(recorded) if recorded else now
    state_of(tokenizer).date = found.astimezone().replace(tzinfo=None) if found.tzinfo else found


def set_template_kwargs(tokenizer: Any, kwargs: dict[str, Any]) -> None:
    """Sets what the chat template is given beside the conversation, such as
    ``{"enable_thinking": False}``."""
    state_of(tokenizer).template_kwargs = kwargs


def chat_date(tokenizer: Any) -> str:
    """Returns the date that the chat template writes, for a manifest; empty if it writes none."""
    dated = CLOCK in template_of(tokenizer)
    return state_of(tokenizer).date.isoformat() if dated else ""


def template_of(tokenizer: Any) -> str:
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


def rendered(tokenizer: Any, messages: list[dict[str, str]], prompts: bool) -> str:
    """Returns the text of a conversation; with `prompts` it ends with the header of an answer.

    Raises LoragenError if the chat template is broken, DataError if it refuses the conversation.
    """
    from jinja2 import TemplateSyntaxError

    template, state, shift = template_of(tokenizer), state_of(tokenizer), 0
    options = dict(state.template_kwargs)
    if CLOCK in template:
        options["chat_template"], shift = _dated(template, state.date), 1
    state.rendered += 1
    try:
        with _ending_in_time() if state.rendered <= WATCHED else nullcontext():
            text: str = tokenizer.apply_chat_template(
                messages, add_generation_prompt=prompts, tokenize=False, **options
            )
    except _EndlessError:
        raise LoragenError(
            f"{_name(tokenizer)}its chat template takes more than {MAX_TEMPLATE_SECONDS:.0f} s for "
            "one conversation: it has loops that do not end"
        ) from None
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


class _EndlessError(BaseException):
    """A chat template has taken too long. It is no Exception, which a template's filter could
    catch."""


@contextmanager
def _ending_in_time() -> Iterator[None]:
    """Raises _EndlessError if the block takes more than `MAX_TEMPLATE_SECONDS`: the loops of a
    stranger's template may be nested as deeply as he likes. Python looks at the time whenever it
    calls a function or begins a line of a template, on every system."""
    end, before = time.thread_time() + MAX_TEMPLATE_SECONDS, sys.gettrace()

    def look(frame: Any, _event: str, _value: Any) -> Any:
        if time.thread_time() > end:
            raise _EndlessError
        return look if frame.f_code.co_filename == "<template>" else None

    sys.settrace(look)
    try:
        yield
    finally:
        sys.settrace(before)


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
    if not template_of(tokenizer):
        return Ending(eos)
    state = state_of(tokenizer)
    given = json.dumps(state.template_kwargs, sort_keys=True, default=str)
    key = (template_of(tokenizer), eos, state.date if chat_date(tokenizer) else None, given)
    if key not in state.endings:
        state.endings[key] = _look_at_template(tokenizer)
    return state.endings[key]


def _look_at_template(tokenizer: Any) -> Ending:
    """Renders a short conversation, and compares what stands around the answer in it with the
    prompt of that answer and with the end token."""
    eos, answer = tokenizer.eos_token_id, "an answer"
    problem = ""
    for system in (None, "Be short."):  # some templates demand a system text
        messages = messages_of("?", system, ())
        answered = [*messages, {"role": "assistant", "content": answer}]
        try:
            asked = rendered(tokenizer, messages, False)
            prompt = rendered(tokenizer, messages, True)
            before, found, after = rendered(tokenizer, answered, False).rpartition(answer)
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
    pad, known = tokenizer.pad_token_id, state_of(tokenizer).embeddings
    if pad is not None and (known is None or pad < known):
        return int(pad)
    check_tokenizer(tokenizer)
    return int(tokenizer.eos_token_id)


def special_tokens(tokenizer: Any, text: str) -> list[str]:
    """Returns the special tokens that a text holds, which the model would not read as text."""
    state = state_of(tokenizer)
    if state.special is None:
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        tokens = {str(one) for one in added if one.special and str(one).strip()}
        longest_first = sorted(tokens, key=lambda one: (-len(one), one))
        state.special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
    return state.special.findall(text)


def prompt_ids(
    tokenizer: Any, prompt: str, system: str | None = None, history: Sequence[Turn] = ()
) -> list[int]:
    """Returns the tokens before the answer; `history` are the turns before the prompt. Where there
    is a chat template, a special token that a row brings is text, which opens no turn.

    Raises DataError if the chat template refuses the conversation.
    """
    if template_of(tokenizer):
        messages = messages_of(prompt, system, history)
        text = rendered(tokenizer, messages, True)
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        return _with_marks_as_text(tokenizer, messages, ids)
    parts = [*([system] if system else []), *(text for turn in history for text in turn), prompt]
    ids = list(tokenizer("".join(f"{part}\n" for part in parts))["input_ids"])
    return ids[: len(ids) - _num_trailing(tokenizer)]


def _with_marks_as_text(
    tokenizer: Any, messages: Sequence[dict[str, str]], ids: list[int]
) -> list[int]:
    """Returns the `ids` of a conversation, in which every special token that comes from a text of
    its messages, and not from the chat template, is replaced by the tokens of its characters."""
    texts = "".join(message["content"] for message in messages)
    if not special_tokens(tokenizer, texts):
        return ids
    marks = state_of(tokenizer).special
    assert marks is not None  # `special_tokens` has made it
    hidden = next(char for char in map(chr, range(0xE000, 0xF8FF)) if char not in texts)
    without = [one | {"content": marks.sub(hidden, one["content"])} for one in messages]
    text = rendered(tokenizer, without, True)
    is_own = [one[0] == hidden for one in re.finditer(f"{hidden}|{marks.pattern}", text)]
    special = {
        one for one, token in tokenizer.added_tokens_decoder.items() if marks.fullmatch(str(token))
    }
    if len(is_own) != sum(one in special for one in ids):  # the template has changed the texts
        return ids
    found, owners = list[int](), iter(is_own)
    for one in ids:
        if one in special and next(owners):
            characters = tokenizer.convert_ids_to_tokens(one)
            found += tokenizer(characters, add_special_tokens=False, split_special_tokens=True)[
                "input_ids"
            ]
        else:
            found.append(one)
    return found


def messages_of(prompt: str, system: str | None, history: Sequence[Turn]) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": system}] if system else []
    for turn in history:
        messages.append({"role": "user", "content": turn.prompt})
        messages.append({"role": "assistant", "content": turn.response})
    return [*messages, {"role": "user", "content": prompt}]


def _num_trailing(tokenizer: Any) -> int:
    """Returns the number of tokens that the tokenizer adds behind every text by itself: an end
    token there would stand between prompt and answer."""
    state = state_of(tokenizer)
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


def check_embeddings(tokenizer: Any, ids: Sequence[int]) -> None:
    """Raises DataError for a token that the base has no embedding for."""
    known = state_of(tokenizer).embeddings
    if known is not None and (largest := max(ids)) >= known:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise DataError(
            f"the token {token!r} has the id {largest}, and the base has embeddings for {known} "
            "tokens: its tokenizer is another model's, or has more tokens than its weights"
        )


# ---------------------------------------------------------------------------- what is odd


def notes(tokenizer: Any, rows: Sequence[Row], source: Source | str) -> list[str]:
    """Returns what a user should know of a tokenizer, its chat template, and rows with texts that
    the model would not read, or not write, as they are; one line each.

    Raises LoragenError as `check_tokenizer`.
    """
    found = list(check_tokenizer(tokenizer).notes)
    found += [
        f"chat_template_kwargs: the chat template does not read '{key}'"
        for key in state_of(tokenizer).template_kwargs
        if key not in template_of(tokenizer)
    ]
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
    read = "is read as text" if template_of(tokenizer) else "the model reads as its own mark"
    for odd, what in (
        (asked, f"a special token in the prompt, which {read}"),
        (answered, "a special token in the response, which no answer can have as text"),
        (changed, "a response that the tokenizer cannot represent"),
    ):
        if odd:
            line, example = odd[0]
            where = place(source, line)
            found.append(f"{where}: {len(odd)} of {len(rows)} rows have {what} ({example})")
    return found


def _bare(text: str) -> str:
    """Returns a text as answers are compared, and without white space, which tokenizers add."""
    return "".join(unicodedata.normalize("NFKC", text).split())


def log_notes(tokenizer: Any, rows: Sequence[Row], source: Source | str) -> None:
    """Logs the `notes` as warnings, those of the tokenizer itself once."""
    said = state_of(tokenizer).said
    for note in notes(tokenizer, rows, source):
        if note not in said:
            log.warning("%s", note)
            said.add(note)
