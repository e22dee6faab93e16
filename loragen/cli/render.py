"""All output of the command line: the answer on stdout, everything else on stderr."""

import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Sequence
from math import isfinite
from typing import Any, Literal

import typer

from loragen.core.errors import display_width, shortened
from loragen.core.progress import is_first_process

WIDEST_NAME = 48
"""`--json` has names in full."""
CONTROLS = r"[\x00-\x08\x0b-\x1f\x7f-\x9f]"
"""Control characters except tab and line feed."""


def answer(text: str) -> None:
    """Prints to stdout, from the first process of a launcher only."""
    if is_first_process():
        typer.echo(text)


def answer_json(document: Any) -> None:
    """Prints one JSON document; NaN and infinity become null, since JSON has neither. Where stdout
    has another encoding than UTF-8, other characters than those of ASCII are escaped."""
    unicode = (getattr(sys.stdout, "encoding", None) or "").lower().startswith("utf")
    answer(json.dumps(_finite(document), indent=2, ensure_ascii=not unicode))


def answer_either(json: bool, document: Any, text: str) -> None:
    """Prints the document with `--json`, else the text."""
    if json:
        answer_json(document)
    else:
        answer(text)


def note(text: str) -> None:
    """Prints a line to stderr."""
    typer.echo(visible(text), err=True)


def problems(lines: Iterable[str]) -> None:
    """Prints `error: ...` lines to stderr. A line break within one, as in a name, is a space."""
    for line in lines:
        text = visible(" ".join(line.splitlines()))
        typer.echo(f"{typer.style('error:', fg='red', bold=True)} {text}", err=True)


def highlighted(text: str, meaning: Literal["good", "dropped"]) -> str:
    """Returns the text green or struck through on a terminal, in ⟦ ⟧ or ⟪ ⟫ elsewhere."""
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        if meaning == "good":
            return typer.style(visible(text), fg="green", bold=True)
        return typer.style(visible(text), dim=True, strikethrough=True)
    first, last = "⟦⟧" if meaning == "good" else "⟪⟫"
    return f"{first}{visible(text)}{last}"


def visible(text: str) -> str:
    """Returns the text with control characters, which a terminal would obey, as `\\x1b`."""
    return re.sub(CONTROLS, lambda c: f"\\x{ord(c[0]):02x}", text)


def columns(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Returns a plain-text table with columns of numbers aligned right, others left. A name in the
    first column takes `WIDEST_NAME` columns of a terminal at most."""
    table = [list(header)]
    for row in rows:
        name, *others = (visible(_cell(value)) for value in row)
        table.append([shortened(name, WIDEST_NAME), *others])
    widths = [max(map(display_width, column)) for column in zip(*table, strict=True)]
    numeric = [
        len(table) > 1 and all(map(_is_number, column[1:])) for column in zip(*table, strict=True)
    ]
    lines = []
    for row in table:
        cells = zip(row, widths, numeric, strict=True)
        padded = []
        for cell, width, right in cells:
            space = " " * (width - display_width(cell))
            padded.append(space + cell if right else cell + space)
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def log_to_stderr() -> None:
    """Sends loragen's log to stderr, warnings as `warning: ...`; safe to call twice."""
    logger = logging.getLogger("loragen")
    if not logger.handlers:
        logger.addHandler(_StderrHandler())
        logger.setLevel(logging.INFO)
        logger.propagate = False


class _StderrHandler(logging.Handler):
    """Writes to the current sys.stderr, which a test may have replaced."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        text = visible(" ".join(record.getMessage().splitlines()))
        print(f"{prefix}{text}", file=sys.stderr, flush=True)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", ""))
    except ValueError:
        return text == "-"
    return True


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value
