"""Values of a document, checked. Each function raises DataError: what is wrong, not where."""

from collections.abc import Mapping, Sequence
from typing import Any

from loragen.core.errors import DataError

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
