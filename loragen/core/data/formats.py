"""The formats of rows: a document's keys decide which entry of `FORMATS` reads it.

All functions raise DataError with the problem of a document; the caller adds file and line.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from string import ascii_uppercase
from typing import Any, NamedTuple

from loragen.core.errors import DataError, listing

Keys = Mapping[str, Any]
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


CALLS = ("tool_calls", "function_call")
"""The keys of a message's calls, which stand beside its text."""


class Turn(NamedTuple):
    """An earlier exchange of a conversation."""

    prompt: str
    response: str


class Question(NamedTuple):
    """Everything in a row but its answer."""

    prompt: str
    system: str | None = None
    history: tuple[Turn, ...] = ()
    choices: list[str] | None = None


@dataclass(frozen=True)
class RowFormat(ABC):
    """A format of rows, and how they are read."""

    keys: tuple[str, ...]
    """A document with all of these keys has this format. The last key holds the answer."""
    optional: tuple[str, ...] = ()
    """Keys of texts that are part of the prompt, if the row has them."""

    @cached_property
    def name(self) -> str:
        return "/".join(self.keys) + "".join(f"[/{key}]" for key in self.optional)

    @property
    def unlabelled(self) -> tuple[str, ...]:
        """The keys without which `question` fails."""
        return self.keys[:-1] or self.keys

    @abstractmethod
    def question(self, document: Keys) -> Question: ...

    @abstractmethod
    def answer(self, document: Keys) -> str: ...


class TextFormat(RowFormat):
    """A prompt and an answer, with an optional system text, history and choices."""

    def question(self, document: Keys) -> Question:
        """Returns the question. `history` is a list of pairs: earlier prompts with responses."""
        extras = [_optional_text(document, extra) for extra in self.optional]
        parts = [_text(document, self.keys[0]), *extras]
        pairs = [
            texts(pair, "history") for pair in _items(document.get("history") or [], "history")
        ]
        if any(len(pair) != 2 for pair in pairs):
            raise DataError("'history': expected pairs of prompt and response")
        choices = document.get("choices")
        return Question(
            "\n\n".join(part for part in parts if part),
            _optional_text(document, "system"),
            tuple(Turn(*pair) for pair in pairs),
            None if choices in (None, "") else texts(choices, "choices"),
        )

    def answer(self, document: Keys) -> str:
        return _answer_text(document, self.keys[-1])


class ChoiceFormat(RowFormat):
    """A question with choices, `{"text": [...], "label": [...]}` or a list of texts."""

    def question(self, document: Keys) -> Question:
        """Returns a question whose prompt lists the choices by letter; the possible answers are
        `[A]`, `[B]` and so on."""
        _, choices = _labelled_choices(document)
        letters = ascii_uppercase[: len(choices)]
        lines = [f"{letter}: {choice}" for letter, choice in zip(letters, choices, strict=True)]
        prompt = "\n".join([_text(document, self.keys[0]), *lines])
        answers = [f"[{letter}]" for letter in letters]
        return Question(prompt, _optional_text(document, "system"), (), answers)

    def answer(self, document: Keys) -> str:
        """Returns the answer, such as `[C]`. A row names it by its label. Choices without labels
        have letters, and a number is their index from 0, as in MMLU."""
        key, (labels, _) = self.keys[-1], _labelled_choices(document)
        given, names = document[key], labels
        if not isinstance(document["choices"], dict):
            if isinstance(given, str) and given.strip().isdecimal():  # CSV has numbers as text
                raise DataError(
                    f"'{key}': {given!r} may count from 0 or from 1: name the choice "
                    f"by its letter, {listing(labels)}"
                )
            if type(given) is int:
                names = [str(number) for number in range(len(labels))]
        if str(given) in names:
            return f"[{ascii_uppercase[names.index(str(given))]}]"
        raise DataError(f"'{key}': {given!r} is none of the choices {listing(labels)}")


class DialogueFormat(RowFormat):
    """A list of messages, `{"role", "content"}` or sharegpt's `{"from", "value"}`."""

    def question(self, document: Keys) -> Question:
        """Returns all messages before the last answer; an unlabelled dialogue ends with a user
        message."""
        system, messages = self._alternating(document)
        before = messages if len(messages) % 2 else messages[:-1]
        if not before:
            raise DataError(f"'{self.keys[0]}': empty conversation")
        history = tuple(Turn(*before[i : i + 2]) for i in range(0, len(before) - 1, 2))
        return Question(before[-1], system or _optional_text(document, "system"), history)

    def answer(self, document: Keys) -> str:
        _, messages = self._alternating(document)
        if len(messages) % 2:
            raise DataError(f"'{self.keys[0]}': the last message is the user's; there is no answer")
        return _answer_text({self.keys[0]: messages[-1]}, self.keys[0])

    def _alternating(self, document: Keys) -> tuple[str | None, list[str]]:
        """Returns (system text, the texts of user and assistant in turn)."""
        (key,) = self.keys
        items = _items(document[key], key)
        for number, item in enumerate(items, start=1):
            if isinstance(item, dict) and any(map(item.get, CALLS)):
                raise DataError(f"'{key}': message {number} calls a tool, which cannot be learned")
        messages = [_message(item, key) for item in items]
        system = messages.pop(0)[1] if messages and messages[0][0] == "system" else None
        for index, (role, _) in enumerate(messages):
            expected = ("user", "assistant")[index % 2]
            if role != expected:
                number = index + (1 if system is None else 2)
                raise DataError(
                    f"'{key}': message {number} is the {role}'s, expected the {expected}'s"
                )
        return system, [content for _, content in messages]


FORMATS: tuple[RowFormat, ...] = (  # the first that fits is used; other keys are ignored
    TextFormat(("prompt", "response")),
    TextFormat(("instruction", "output"), ("input",)),
    ChoiceFormat(("question", "choices", "answerKey")),
    DialogueFormat(("messages",)),
    DialogueFormat(("conversations",)),
    # Other keys that are common on the hub.
    TextFormat(("prompt", "completion")),
    TextFormat(("query", "response")),
    TextFormat(("instruction", "response"), ("context",)),
    ChoiceFormat(("question_stem", "choices", "answerKey")),
    ChoiceFormat(("question", "choices", "answer")),
    TextFormat(("question", "answer")),
)


def format_of(document: Any) -> RowFormat:
    """Returns the first format whose keys the document has.

    Raises DataError naming the keys found and the formats known.
    """
    if not isinstance(document, dict):
        raise DataError(f"expected an object, found {_kind(document)}")
    known = _labelled_format_of(document)
    if known is not None:
        return known
    found = listing([str(key) for key in document])
    unlabelled = _unlabelled_format_of(document)
    if unlabelled is not None:
        raise DataError(f"'{unlabelled.keys[-1]}' is missing (keys here: {found})")
    formats = listing([known.name for known in FORMATS], limit=len(FORMATS))
    raise DataError(f"unknown keys: {found}. Known: {formats}")


def question_of(document: Any) -> Question:
    """Returns the question of a row, labelled or not; a bare text is its own question."""
    if isinstance(document, str):
        return Question(document)
    found = _kind(document)
    if isinstance(document, dict):
        known = _labelled_format_of(document) or _unlabelled_format_of(document)
        if known is not None:
            return known.question(document)
        found = f"keys {listing([str(key) for key in document])}"
    raise DataError(f"expected a text or an object with a 'prompt' (or a row), found {found}")


def _labelled_format_of(document: Keys) -> RowFormat | None:
    return _labelled_format(tuple(document))


@lru_cache(maxsize=256)  # nearly all rows of a dataset have the same keys
def _labelled_format(keys: tuple[str, ...]) -> RowFormat | None:
    fitting = (known for known in FORMATS if all(key in keys for key in known.keys))
    return next(fitting, None)


def _unlabelled_format_of(document: Keys) -> RowFormat | None:
    """Returns the format that the row would have with its answer: the first that fits its keys, or
    one that differs from that by optional keys alone and has more of them."""
    fitting = [known for known in FORMATS if all(key in document for key in known.unlabelled)]
    alike = [known for known in fitting if known.unlabelled == fitting[0].unlabelled]
    return max(
        alike, key=lambda known: sum(map(document.__contains__, known.optional)), default=None
    )


def texts(value: Any, key: str) -> list[str]:
    """Returns a list of texts. Raises DataError for anything else."""
    return [_text({key: item}, key) for item in _items(value, key)]


def _text(document: Keys, key: str) -> str:
    value = document.get(key)
    if not isinstance(value, str):
        raise DataError(f"'{key}': expected a text, found {_kind(value)}")
    if "\0" in value:
        raise DataError(f"'{key}': holds a NUL character, which is no text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"'{key}': holds half of a surrogate pair, which is no text") from None
    return value


def _optional_text(document: Keys, key: str) -> str | None:
    """Returns a text or None. An empty text, as in a CSV cell, counts as None."""
    return None if document.get(key) in (None, "") else _text(document, key)


def _answer_text(document: Keys, key: str) -> str:
    answer = _text(document, key)
    if not answer.strip():
        raise DataError(f"'{key}' is empty: there is nothing to learn")
    return answer


def _items(value: Any, key: str) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise DataError(f"'{key}': expected a list, found {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    """Returns the name of a value's type, as JSON has it."""
    names = {"NoneType": "null", "str": "a text", "dict": "an object", "list": "a list"}
    return names.get(type(value).__name__, f"{type(value).__name__} {value!r:.40}")


def _labelled_choices(document: Keys) -> tuple[list[str], list[str]]:
    """Returns (labels, texts); a list of texts has the letters for labels."""
    choices = document["choices"]
    if isinstance(choices, dict):
        answers = texts(choices.get("text"), "choices.text")
        labels = [str(label) for label in _items(choices.get("label"), "choices.label")]
    else:
        answers = texts(choices, "choices")
        labels = list(ascii_uppercase[: len(answers)])
    if len(labels) != len(answers) or not 2 <= len(answers) <= len(ascii_uppercase):
        counts = f"{len(answers)} texts, {len(labels)} labels"
        raise DataError(f"'choices': expected 2 to 26 texts and as many labels, found {counts}")
    return labels, answers


def _message(message: Any, key: str) -> tuple[str, str]:
    """Returns (role, text) of a message."""
    if not isinstance(message, dict):
        raise DataError(f"'{key}': expected messages, found {_kind(message)}")
    role, content = ("from", "value") if "from" in message else ("role", "content")
    name = _text(message, role)
    if name not in ROLES:
        raise DataError(f"'{key}': unknown {role} '{name}'. Known: {listing(list(ROLES))}")
    return ROLES[name], _text(message, content)
