"""The formats of rows: a document's keys decide which entry of `FORMATS` reads it.

All functions raise DataError with the problem of a document; the caller adds file and line.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from math import isfinite
from string import ascii_uppercase
from typing import Any, NamedTuple

from loragen.core.errors import DataError, listing

Keys = Mapping[str, Any]
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
CALLS = ("tool_calls", "function_call")
"""The keys of a message's calls, which stand beside its text."""
TOOLS = ("tool", "function", "function_call", "observation", "ipython")
"""The roles of calls, and of what is called."""
TEXT_PARTS = ("text", "input_text", "output_text")
"""The types of the parts of a message that are texts."""


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


class Answer(NamedTuple):
    """The answer of a row."""

    response: str
    also_right: tuple[str, ...] = ()
    """Other answers that an evaluation counts as right."""
    as_json: bool = False
    """Whether the row has a number or a boolean, which is taken as its JSON text."""


@dataclass(frozen=True)
class RowFormat(ABC):
    """A format of rows, and how they are read."""

    keys: tuple[str, ...]
    """A document with all of these keys has this format. The last key holds the answer."""
    optional: tuple[str, ...] = ()
    """Keys of texts that follow in the prompt, if the row has them."""
    before: tuple[str, ...] = ()
    """Keys of texts that precede in the prompt, if the row or the file around it has them."""
    known_from: str = ""
    """Who writes such rows, for the documentation."""

    @cached_property
    def name(self) -> str:
        before = "".join(f"[{key}/]" for key in self.before)
        return before + "/".join(self.keys) + "".join(f"[/{key}]" for key in self.optional)

    @property
    def unlabelled(self) -> tuple[str, ...]:
        """The keys without which `question` fails."""
        return self.keys[:-1] or self.keys

    @property
    @abstractmethod
    def reading(self) -> str:
        """What is read from the keys, for the documentation."""

    def takes(self, document: Keys) -> bool:  # noqa: ARG002  # of a protocol
        """Returns whether a document that has the keys has this format."""
        return True

    @abstractmethod
    def question(self, document: Keys) -> Question: ...

    @abstractmethod
    def answer(self, document: Keys) -> Answer: ...

    def _prompt(self, document: Keys) -> str:
        parts = [
            *(_optional_text(document, key) for key in self.before),
            _text(document, self.keys[0]),
            *(_optional_text(document, key) for key in self.optional),
        ]
        return "\n\n".join(part for part in parts if part)


class TextFormat(RowFormat):
    """A prompt and an answer, with an optional system text, history and choices."""

    @property
    def reading(self) -> str:
        parts = [*self.before, self.keys[0], *self.optional]
        return "the prompt is " + ", ".join(parts) if len(parts) > 1 else "as they are"

    def question(self, document: Keys) -> Question:
        """Returns the question. `history` is a list of pairs: earlier prompts with responses."""
        pairs = [
            texts(pair, "history") for pair in _items(document.get("history") or [], "history")
        ]
        if any(len(pair) != 2 for pair in pairs):
            raise DataError("'history': expected pairs of prompt and response")
        choices = document.get("choices")
        return Question(
            self._prompt(document),
            _optional_text(document, "system"),
            tuple(Turn(*pair) for pair in pairs),
            None if choices in (None, "") else texts(choices, "choices"),
        )

    def answer(self, document: Keys) -> Answer:
        """Returns the answer. The first one of a list is learned; any of them is right."""
        key = self.keys[-1]
        given = document[key]
        several = given if isinstance(given, list | tuple) else [given]
        if not several:
            raise DataError(f"'{key}' is empty: there is nothing to learn")
        found = list(dict.fromkeys(_answer_text(one, key) for one in several))
        return Answer(found[0], tuple(found[1:]), any(map(_is_json_scalar, several)))


class ChoiceFormat(RowFormat):
    """A question with choices, `{"text": [...], "label": [...]}` or a list of texts."""

    @property
    def reading(self) -> str:
        shown = ", ".join([*self.before, self.keys[0]])
        return (
            f"the prompt is {shown} and the choices with letters; the answer is the letter in "
            "brackets, `[B]`"
        )

    def question(self, document: Keys) -> Question:
        """Returns a question whose prompt lists the choices by letter; the possible answers are
        `[A]`, `[B]` and so on."""
        _, choices = self._choices(document)
        letters = ascii_uppercase[: len(choices)]
        lines = [f"{letter}: {choice}" for letter, choice in zip(letters, choices, strict=True)]
        prompt = "\n".join([self._prompt(document), *lines])
        answers = [f"[{letter}]" for letter in letters]
        return Question(prompt, _optional_text(document, "system"), (), answers)

    def answer(self, document: Keys) -> Answer:
        """Returns the answer, such as `[C]`. A row names it by its label or by its text. Choices
        without labels have letters, and a number is their index from 0, as in MMLU."""
        key, (labels, choices) = self.keys[-1], self._choices(document)
        given = document[key]
        if type(given) is int and not isinstance(document["choices"], dict):
            found = {given} & set(range(len(choices)))
        else:
            found = {at for at, label in enumerate(labels) if label == str(given)}
            found |= {at for at, choice in enumerate(choices) if choice == given}
            if not isinstance(document["choices"], dict) and isinstance(given, str):
                number = given.strip()  # CSV has numbers as text
                if number.isdecimal() and (not found or int(number) <= len(choices)):
                    raise DataError(
                        f"'{key}': {given!r} may count from 0 or from 1: name the choice "
                        f"by its letter, {listing(labels)}"
                    )
        if len(found) > 1:
            several = listing([labels[at] for at in sorted(found)])
            raise DataError(f"'{key}': {given!r} is the label or the text of several: {several}")
        if not found:
            raise DataError(f"'{key}': {given!r} is none of the choices {listing(labels)}")
        return Answer(f"[{ascii_uppercase[found.pop()]}]")

    def _choices(self, document: Keys) -> tuple[list[str], list[str]]:
        """Returns (labels, texts); a list of texts has the letters for labels."""
        choices = document["choices"]
        if isinstance(choices, dict):
            found = texts(choices.get("text"), "choices.text")
            labels = [str(label) for label in _items(choices.get("label"), "choices.label")]
        else:
            found = texts(choices, "choices")
            labels = list(ascii_uppercase[: len(found)])
        if len(labels) != len(found) or not 2 <= len(found) <= len(ascii_uppercase):
            counts = f"{len(found)} texts, {len(labels)} labels"
            raise DataError(f"'choices': expected 2 to 26 texts and as many labels, found {counts}")
        return labels, found


class ScoredFormat(ChoiceFormat):
    """A question with a score for each choice, `{"yes": 1, "no": 0}`."""

    @property
    def unlabelled(self) -> tuple[str, ...]:
        return self.keys  # the answers to choose between are those with a score

    @property
    def reading(self) -> str:
        return f"{super().reading}; those with the highest score are right"

    def answer(self, document: Keys) -> Answer:
        """Returns the first choice with the highest score; all of them are right."""
        scores = self._scores(document)
        best = max(scores.values())
        right = [
            f"[{letter}]"
            for letter, score in zip(ascii_uppercase, scores.values(), strict=False)
            if score == best
        ]
        return Answer(right[0], tuple(right[1:]))

    def _choices(self, document: Keys) -> tuple[list[str], list[str]]:
        choices = list(self._scores(document))
        return list(ascii_uppercase[: len(choices)]), choices

    def _scores(self, document: Keys) -> dict[str, float]:
        key = self.keys[-1]
        scores = document[key]
        if not isinstance(scores, dict):
            raise DataError(f"'{key}': expected an object, found {_kind(scores)}")
        given = {text: score for text, score in scores.items() if score is not None}  # in Parquet
        for text, score in given.items():
            if not _is_json_scalar(score):  # nor NaN, of which none is the highest
                raise DataError(f"'{key}': expected a number for {text!r}, found {_kind(score)}")
        if not 2 <= len(given) <= len(ascii_uppercase):
            raise DataError(f"'{key}': expected scores of 2 to 26 texts, found {len(given)}")
        return given


class DialogueFormat(RowFormat):
    """A list of messages, `{"role", "content"}` or sharegpt's `{"from", "value"}`; of several keys,
    each holds a part of it."""

    @cached_property
    def name(self) -> str:
        return super().name + (" (messages)" if len(self.keys) > 1 else "")

    @property
    def reading(self) -> str:
        return "the answer is the last assistant turn; everything before it is context"

    def takes(self, document: Keys) -> bool:
        return len(self.keys) == 1 or isinstance(document[self.keys[0]], list | tuple)

    def question(self, document: Keys) -> Question:
        """Returns all messages before the last answer; an unlabelled dialogue ends with a user
        message."""
        system, messages = self._alternating(document)
        before = messages if len(messages) % 2 else messages[:-1]
        if not before:
            raise DataError(f"{self._quoted}: empty conversation")
        history = tuple(Turn(*before[i : i + 2]) for i in range(0, len(before) - 1, 2))
        return Question(before[-1], system or _optional_text(document, "system"), history)

    def answer(self, document: Keys) -> Answer:
        _, messages = self._alternating(document)
        if len(messages) % 2:
            raise DataError(f"{self._quoted}: the last message is the user's; there is no answer")
        return Answer(_answer_text(messages[-1], self.keys[-1]))

    @property
    def _quoted(self) -> str:
        return " and ".join(f"'{key}'" for key in self.keys)

    def _alternating(self, document: Keys) -> tuple[str | None, list[str]]:
        """Returns (system text, the texts of user and assistant in turn)."""
        parts = [_items(document[key], key) for key in self.keys if key in document]
        messages = []
        for number, item in enumerate(chain.from_iterable(parts), start=1):
            try:
                messages.append(_message(item))
            except DataError as error:
                raise DataError(f"{self._quoted}: message {number} {error}") from None
        system = messages.pop(0)[1] if messages and messages[0][0] == "system" else None
        for index, (role, _) in enumerate(messages):
            expected = ("user", "assistant")[index % 2]
            if role != expected:
                number = index + (1 if system is None else 2)
                raise DataError(
                    f"{self._quoted}: message {number} is the {role}'s, expected the {expected}'s"
                )
        return system, [content for _, content in messages]


PASSAGE = ("context", "passage")
"""Keys of a text that a question is about."""
FORMATS: tuple[RowFormat, ...] = (  # the first that fits is used; other keys are ignored
    DialogueFormat(("prompt", "completion"), known_from="TRL"),  # the prompt is a list of messages
    TextFormat(("prompt", "response")),
    TextFormat(("instruction", "output"), ("input",), known_from="Alpaca"),
    ChoiceFormat(("question", "choices", "answerKey"), before=PASSAGE, known_from="ARC"),
    DialogueFormat(("messages",), known_from="OpenAI, TRL"),
    DialogueFormat(("conversations",), known_from="ShareGPT"),
    TextFormat(("prompt", "completion"), known_from="TRL"),
    TextFormat(("query", "response")),
    TextFormat(("instruction", "response"), ("context",), known_from="Dolly"),
    ChoiceFormat(("question_stem", "choices", "answerKey"), known_from="OpenBookQA"),
    ChoiceFormat(("question", "choices", "answer"), before=PASSAGE, known_from="MMLU"),
    TextFormat(("question", "answer"), before=PASSAGE, known_from="GSM8K, BoolQ"),
    TextFormat(("input", "output"), before=("Definition",), known_from="Super-NaturalInstructions"),
    ScoredFormat(("input", "target_scores"), before=("task_prefix",), known_from="BIG-bench"),
    TextFormat(("input", "target"), before=("task_prefix",), known_from="BIG-bench"),
    TextFormat(("input", "targets")),
    TextFormat(("inputs_pretokenized", "targets_pretokenized"), known_from="P3"),
    TextFormat(("inputs", "targets"), before=("definition",), known_from="FLAN, xP3"),
)
AROUND = ("system", *dict.fromkeys(key for known in FORMATS for key in known.before))
"""Keys that a file may have beside the list of its rows, for all of them."""


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
    return next((one for one in _with_keys(tuple(document)) if one.takes(document)), None)


@lru_cache(maxsize=256)  # nearly all rows of a dataset have the same keys
def _with_keys(keys: tuple[str, ...]) -> list[RowFormat]:
    return [known for known in FORMATS if all(key in keys for key in known.keys)]


def _unlabelled_format_of(document: Keys) -> RowFormat | None:
    """Returns the format that the row would have with its answer: the first that fits its keys, or
    one that differs from that by optional keys alone and has more of them."""
    fitting = [
        known
        for known in FORMATS
        if all(key in document for key in known.unlabelled) and known.takes(document)
    ]
    alike = [known for known in fitting if known.unlabelled == fitting[0].unlabelled]
    return max(
        alike,
        key=lambda known: sum(map(document.__contains__, (*known.before, *known.optional))),
        default=None,
    )


def texts(value: Any, key: str) -> list[str]:
    """Returns a list of texts. Raises DataError for anything else."""
    return [_text({key: item}, key) for item in _items(value, key)]


def _text(document: Keys, key: str) -> str:
    value = document.get(key)
    if not isinstance(value, str):
        raise DataError(f"'{key}': expected a text, found {_kind(value)}")
    if "\0" in value:
        raise DataError(f"'{key}': holds a NUL character, which is not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"'{key}': holds half of a surrogate pair, which is not text") from None
    return value


def _optional_text(document: Keys, key: str) -> str | None:
    """Returns a text or None. An empty text, as in a CSV cell, counts as None."""
    return None if document.get(key) in (None, "") else _text(document, key)


def _answer_text(given: Any, key: str) -> str:
    """Returns an answer as a text; a number or a boolean is its JSON text."""
    answer = json.dumps(given) if _is_json_scalar(given) else _text({key: given}, key)
    if not answer.strip():
        raise DataError(f"'{key}' is empty: there is nothing to learn")
    return answer


def _is_json_scalar(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, float) and isfinite(value))


def _items(value: Any, key: str) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise DataError(f"'{key}': expected a list, found {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    """Returns the name of a value's type, as JSON has it."""
    names = {"NoneType": "null", "str": "a text", "dict": "an object", "list": "a list"}
    return names.get(type(value).__name__, f"{type(value).__name__} {value!r:.40}")


def _message(message: Any) -> tuple[str, str]:
    """Returns (role, text) of a message. Raises DataError that says what it is instead."""
    if not isinstance(message, dict):
        raise DataError(f"is {_kind(message)}, no message")
    role, content = ("from", "value") if "from" in message else ("role", "content")
    name = message.get(role)
    if any(map(message.get, CALLS)) or name == "function_call":
        raise DataError("calls a tool, which cannot be learned")
    if name in TOOLS:
        raise DataError("is a tool's, which cannot be learned")
    if not isinstance(name, str) or name not in ROLES:
        shown = repr(name) if isinstance(name, str) else _kind(name)
        raise DataError(f"has the unknown {role} {shown}. Known: {listing(list(ROLES))}")
    parts = message.get(content)
    try:
        text = _joined(parts) if isinstance(parts, list) else _text(message, content)
    except DataError as error:
        raise DataError(f"has a bad {error}") from None
    return ROLES[name], text


def _joined(parts: list[Any]) -> str:
    """Returns the texts of a message's parts, each on a line, as servers (vLLM, llama.cpp) join
    them. Raises DataError for parts that are no text."""
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else None
        if kind is None:
            raise DataError(f"'content': expected parts with a type, found {_kind(part)}")
        if kind not in TEXT_PARTS:
            raise DataError(f"'content': a part of the type '{kind}', and only text can be learned")
    return "\n".join(_text(part, "text") for part in parts)
