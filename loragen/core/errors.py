"""The errors that are printed as one line on stderr, and their exit codes.

Any other exception that reaches the user is a bug.
"""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from itertools import accumulate
from unicodedata import combining, east_asian_width

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


class LoragenError(Exception):
    """An error that the user can mend. The message is one line and says how.

    ``problems`` holds several such lines if more than one thing is wrong.
    """

    exit_code = EXIT_FAILED

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class UsageError(LoragenError):
    """The command cannot start: a missing file, an unknown name, options that contradict."""

    exit_code = EXIT_USAGE


class ConfigError(UsageError):
    """The configuration does not validate; ``problems`` lists everything wrong with it."""


class PluginError(UsageError):
    """A chosen plugin is unknown, clashes with another, or breaks its protocol."""


class WriteError(LoragenError):
    """A file cannot be written: the disk is full, or read-only."""


class DataError(LoragenError):
    """The content of a file is not valid."""


class Interrupted(LoragenError):  # noqa: N818  # not a failure
    """The user, or the scheduler, has stopped the training, which can be resumed."""

    exit_code = EXIT_INTERRUPTED


def one_line(error: BaseException) -> str:
    """Returns the first of an error's problems in one line, or the class and message of an error
    that is not a LoragenError."""
    if isinstance(error, LoragenError):
        more = f" (and {len(error.problems) - 1} more)" if len(error.problems) > 1 else ""
        return f"{error.problems[0]}{more}" if error.problems else "no message"
    reason = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {reason}"


def first_line(error: BaseException) -> str:
    """Returns the first line of the message of a library's error; its class if it has none."""
    return str(error).strip().partition("\n")[0].strip() or type(error).__name__


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns `" Did you mean 'sbert'?"`, or an empty text if no known word is similar."""
    near = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""


def listing(words: Sequence[str], limit: int = 12) -> str:
    """Returns `"a, b, c"`, cut after `limit` words with a count of the rest; `"none"` for none."""
    shown = ", ".join(words[:limit]) or "none"
    rest = len(words) - limit
    return f"{shown} and {rest} more" if rest > 0 else shown


def counted(number: int, noun: str) -> str:
    """Returns `1 dataset`, `2 datasets`, `1,000 values`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def pip_install(extra: str) -> str:
    """Returns the command that installs the packages of an extra, whether loragen comes from a
    package index or from a checkout."""
    from importlib.metadata import PackageNotFoundError, requires

    try:
        found = [line.partition(";") for line in requires("loragen") or ()]
    except PackageNotFoundError:
        found = []
    of_extra = re.compile(rf"""extra\s*==\s*["']{extra}["']""")
    names = [name.strip() for name, _, marker in found if of_extra.search(marker)]
    return "pip install " + " ".join(f"'{name}'" for name in names or [f"loragen[{extra}]"])


def display_width(text: str) -> int:
    """Returns the number of columns that a terminal takes for the text: two for a character of
    Chinese, none for a combining accent."""
    return len(text) if text.isascii() else sum(map(_width, text))


def _width(char: str) -> int:
    return 0 if combining(char) else 2 if east_asian_width(char) in "WF" else 1


def shortened(text: str, longest: int) -> str:
    """Returns the text in one line of at most `longest` columns of a terminal: of a longer one the
    start and the end, which often has the number that tells names apart."""
    flat = " ".join(text.split())
    if display_width(flat) <= longest:
        return flat
    start, end = len(flat) * 2 // 3, len(flat) * 2 // 3
    before = list(accumulate(map(_width, flat), initial=0))  # the columns before each character
    while before[start] + before[-1] - before[end] >= longest:
        if start > 2 * (len(flat) - end):
            start -= 1
        else:
            end += 1
    return f"{flat[:start]}…{flat[end:]}"
