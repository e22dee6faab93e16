"""Values of a document, checked. Each function raises DataError: what is wrong, not where.

What a document means is told by its keys: one entry in `FORMATS` per kind of row.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from string import ascii_uppercase
from typing import Any, NamedTuple

from loragen.core.errors import DataError, listing

Keys = Mapping[str, Any]


def text(document: Keys, key: str) -> str:
    value = document.get(key)
    if not isinstance(value, str):
        raise DataError(f"'{key}': expected a text, found {kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"'{key}': holds half of a surrogate pair, which is no text") from None
    return value


def answer_text(document: Keys, key: str) -> str:
    answer = text(document, key)
    if not answer.strip():
        raise DataError(f"'{key}' is empty: there is nothing to learn")
    return answer


def optional_text(document: Keys, key: str) -> str | None:
    """An empty text, as a CSV cell has it, is none."""
    return None if document.get(key) in (None, "") else text(document, key)


def items(value: Any, key: str) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise DataError(f"'{key}': expected a list, found {kind(value)}")
    return value


def texts(value: Any, key: str) -> list[str]:
    return [text({key: item}, key) for item in items(value, key)]


def optional_texts(document: Keys, key: str) -> list[str] | None:
    value = document.get(key)
    return None if value in (None, "") else texts(value, key)


def kind(value: Any) -> str:
    """What a value is, in the words of JSON where Python has others."""
    names = {"NoneType": "null", "str": "a text", "dict": "an object", "list": "a list"}
    return names.get(type(value).__name__, f"{type(value).__name__} {value!r:.40}")


ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


class Turn(NamedTuple):
    """An earlier exchange of a conversation."""

    prompt: str
    response: str


class Question(NamedTuple):
    """All of a row but its answer."""

    prompt: str
    system: str | None = None
    history: tuple[Turn, ...] = ()
    choices: list[str] | None = None


class RowFormat(NamedTuple):
    """How a kind of row is read. Both functions raise DataError: what is wrong, not where."""

    keys: tuple[str, ...]
    """A document is of this format where it has them all."""
    question: Callable[[Keys], Question]
    answer: Callable[[Keys], str]
    unlabelled: tuple[str, ...]
    """The keys that `question` needs."""
    optional: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "/".join(self.keys) + "".join(f"[/{key}]" for key in self.optional)


def format_of(document: Any) -> RowFormat:
    """The first format whose keys the document has.

    Raises DataError naming the keys found and the formats known.
    """
    if not isinstance(document, dict):
        raise DataError(f"expected an object, found {kind(document)}")
    for known in FORMATS:
        if all(key in document for key in known.keys):
            return known
    found = listing([str(key) for key in document])
    without = _unlabelled_format_of(document)
    if without is not None:
        raise DataError(f"'{without.keys[-1]}' is missing (keys here: {found})")
    formats = listing([known.name for known in FORMATS], limit=len(FORMATS))
    raise DataError(f"unknown keys: {found}. Known: {formats}")


def question_of(document: Any) -> Question:
    """The question of a row, labelled or not; of a bare text, the text."""
    if isinstance(document, str):
        return Question(document)
    if isinstance(document, dict):
        labelled = (known for known in FORMATS if all(key in document for key in known.keys))
        known = next(labelled, None) or _unlabelled_format_of(document)
        if known is not None:
            return known.question(document)
        found = f"keys {listing([str(key) for key in document])}"
    else:
        found = kind(document)
    raise DataError(f"expected a text or an object with a 'prompt' (or a row), found {found}")


def _unlabelled_format_of(document: Keys) -> RowFormat | None:
    """The format that a row without its answer had with it, as far as its keys tell: of those that
    differ from the first that fits by optional keys alone, the one with most of them."""
    fitting = [known for known in FORMATS if all(key in document for key in known.unlabelled)]
    alike = [known for known in fitting if known.unlabelled == fitting[0].unlabelled]
    return max(
        alike, key=lambda known: sum(map(document.__contains__, known.optional)), default=None
    )


def _text_question(key: str, extras: tuple[str, ...], document: Keys) -> Question:
    """`extras` are keys of texts that belong to the prompt, where the row has them.

    `history` is a list of pairs, earlier prompts with their responses.
    """
    parts = [text(document, key), *(optional_text(document, extra) for extra in extras)]
    pairs = [texts(pair, "history") for pair in items(document.get("history") or [], "history")]
    if any(len(pair) != 2 for pair in pairs):
        raise DataError("'history': expected pairs of prompt and response")
    return Question(
        "\n\n".join(part for part in parts if part),
        optional_text(document, "system"),
        tuple(Turn(*pair) for pair in pairs),
        optional_texts(document, "choices"),
    )


def _choice_question(key: str, document: Keys) -> Question:
    """The question with its choices lettered; the answers to choose between are `[A]`, `[B]`."""
    _, choices = _labelled_choices(document)
    letters = ascii_uppercase[: len(choices)]
    lines = [f"{letter}: {choice}" for letter, choice in zip(letters, choices, strict=True)]
    prompt = "\n".join([text(document, key), *lines])
    answers = [f"[{letter}]" for letter in letters]
    return Question(prompt, optional_text(document, "system"), (), answers)


def _chosen(key: str, document: Keys) -> str:
    """`[C]`. The choice is named by its label; choices without labels have letters, and a number
    counts them from 0, as in MMLU."""
    labels, _ = _labelled_choices(document)
    given, names = document[key], labels
    if not isinstance(document["choices"], dict):
        if isinstance(given, str) and given.strip().isdecimal():  # any number in a CSV file is one
            raise DataError(
                f"'{key}': {given!r} may count from 0 or from 1: name the choice by its letter, "
                f"{listing(labels)}"
            )
        if type(given) is int:
            names = [str(number) for number in range(len(labels))]
    if str(given) in names:
        return f"[{ascii_uppercase[names.index(str(given))]}]"
    raise DataError(f"'{key}': {given!r} is none of the choices {listing(labels)}")


def _labelled_choices(document: Keys) -> tuple[list[str], list[str]]:
    """(labels, texts) of `{"text": [...], "label": [...]}` or of a list of texts."""
    choices = document["choices"]
    if isinstance(choices, dict):
        answers = texts(choices.get("text"), "choices.text")
        labels = [str(label) for label in items(choices.get("label"), "choices.label")]
    else:
        answers = texts(choices, "choices")
        labels = list(ascii_uppercase[: len(answers)])
    if len(labels) != len(answers) or not 2 <= len(answers) <= len(ascii_uppercase):
        counts = f"{len(answers)} texts, {len(labels)} labels"
        raise DataError(f"'choices': expected 2 to 26 texts and as many labels, found {counts}")
    return labels, answers


def _dialogue_question(key: str, document: Keys) -> Question:
    """What stands before the last answer; an unlabelled dialogue has no last answer."""
    system, said = _alternating(key, document)
    asked = said if len(said) % 2 else said[:-1]
    if not asked:
        raise DataError(f"'{key}': nobody says anything")
    history = tuple(Turn(*asked[place : place + 2]) for place in range(0, len(asked) - 1, 2))
    return Question(asked[-1], system or optional_text(document, "system"), history)


def _last_answer(key: str, document: Keys) -> str:
    _, said = _alternating(key, document)
    if len(said) % 2:
        raise DataError(f"'{key}': the last message is the user's: there is nothing to learn")
    return answer_text({key: said[-1]}, key)


def _alternating(key: str, document: Keys) -> tuple[str | None, list[str]]:
    """(system text, the texts of user and assistant in turn)."""
    messages = [_message(item, key) for item in items(document[key], key)]
    system = messages.pop(0)[1] if messages and messages[0][0] == "system" else None
    for place, (role, _) in enumerate(messages):
        expected = ("user", "assistant")[place % 2]
        if role != expected:
            number = place + (1 if system is None else 2)
            raise DataError(f"'{key}': message {number} is the {role}'s, expected the {expected}'s")
    return system, [said for _, said in messages]


def _message(message: Any, key: str) -> tuple[str, str]:
    """(role, text) of `{"role", "content"}` or sharegpt's `{"from", "value"}`."""
    if not isinstance(message, dict):
        raise DataError(f"'{key}': expected messages, found {kind(message)}")
    role, content = ("from", "value") if "from" in message else ("role", "content")
    name = text(message, role)
    if name not in ROLES:
        raise DataError(f"'{key}': unknown {role} '{name}'. Known: {listing(list(ROLES))}")
    return ROLES[name], text(message, content)


def _texts_format(key: str, answer: str, *extras: str) -> RowFormat:
    question = partial(_text_question, key, extras)
    return RowFormat((key, answer), question, partial(answer_text, key=answer), (key,), extras)


def _choice_format(key: str, answer: str) -> RowFormat:
    question, chosen = partial(_choice_question, key), partial(_chosen, answer)
    return RowFormat((key, "choices", answer), question, chosen, (key, "choices"))


def _dialogue_format(key: str) -> RowFormat:
    question, answer = partial(_dialogue_question, key), partial(_last_answer, key)
    return RowFormat((key,), question, answer, (key,))


FORMATS = (  # the first that fits: a row with a prompt and a response may carry anything else
    _texts_format("prompt", "response"),
    _texts_format("instruction", "output", "input"),
    _choice_format("question", "answerKey"),
    _dialogue_format("messages"),
    _dialogue_format("conversations"),
    # Other spellings that are common on the hub.
    _texts_format("prompt", "completion"),
    _texts_format("query", "response"),
    _texts_format("instruction", "response", "context"),
    _choice_format("question_stem", "answerKey"),
    _choice_format("question", "answer"),
    _texts_format("question", "answer"),
)
