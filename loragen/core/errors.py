"""The errors that become one line on stderr, and the exit codes they carry.

Anything else that escapes is a bug of ours.
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


class LoragenError(Exception):
    """Something a user can act on. The message is one line and says what to do.

    ``problems`` holds several such lines where more than one thing is wrong.
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
    """A plugin that was asked for is unknown, clashes with another, or breaks its promise."""


class DataError(LoragenError):
    """A file was found but what it holds is not what it should be."""


class Interrupted(LoragenError):  # noqa: N818  # nothing went wrong
    """The user, or the scheduler, wanted the training to stop; it can be gone on with."""

    exit_code = EXIT_INTERRUPTED


def one_line(error: BaseException) -> str:
    """What went wrong, the first of several problems; of a stranger's error also its kind."""
    if isinstance(error, LoragenError):
        more = f" (and {len(error.problems) - 1} more)" if len(error.problems) > 1 else ""
        return f"{error.problems[0]}{more}" if error.problems else "no message"
    reason = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {reason}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`" Did you mean 'sbert'?"`, or nothing where no known word is near."""
    near = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""


def listing(words: Sequence[str], limit: int = 12) -> str:
    """`"a, b, c"`, cut after `limit` words with a count of the rest; `"none"` for no words."""
    shown = ", ".join(words[:limit]) or "none"
    rest = len(words) - limit
    return f"{shown} and {rest} more" if rest > 0 else shown
