"""The only place that prints. stdout carries the answer, stderr everything else."""

import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import typer

CONTROLS = r"[\x00-\x08\x0b-\x1f\x7f-\x9f]"  # all but tab and line feed


def answer(text: str) -> None:
    """One answer per command, however many processes a launcher has started for it."""
    if is_first_process():
        typer.echo(text)


def is_first_process() -> bool:
    """Whether we are the one of all processes of a launcher (torchrun, Slurm, Lightning)."""
    ranks = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
    return all(os.environ.get(rank, "0") == "0" for rank in ranks)


def answer_json(document: Any) -> None:
    """One JSON document and nothing else; NaN and infinity become null, as JSON has neither."""
    answer(json.dumps(_finite(document), indent=2, ensure_ascii=False))


def note(text: str) -> None:
    typer.echo(text, err=True)


def problems(lines: Iterable[str]) -> None:
    for line in lines:
        typer.echo(f"{typer.style('error:', fg='red', bold=True)} {line}", err=True)


def highlighted(text: str, meaning: Literal["good", "dropped"]) -> str:
    """Part of a text: green or struck through on a terminal, ⟦ ⟧ or ⟪ ⟫ elsewhere."""
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        if meaning == "good":
            return typer.style(visible(text), fg="green", bold=True)
        return typer.style(visible(text), dim=True, strikethrough=True)
    first, last = "⟦⟧" if meaning == "good" else "⟪⟫"
    return f"{first}{visible(text)}{last}"


def visible(text: str) -> str:
    """Text from a file, with the control characters that would steer a terminal spelt out."""
    return re.sub(CONTROLS, lambda c: f"\\x{ord(c[0]):02x}", text)


def columns(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Left-aligned text columns; numbers are right-aligned. Reads the same in a pipe."""
    table = [list(header), *([_cell(value) for value in row] for row in rows)]
    numeric = [
        all(_is_number(row[i]) for row in table[1:]) and len(table) > 1 for i in range(len(header))
    ]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    lines = []
    for row in table:
        cells = zip(row, widths, numeric, strict=True)
        text = (cell.rjust(width) if right else cell.ljust(width) for cell, width, right in cells)
        lines.append("  ".join(text).rstrip())
    return "\n".join(lines)


def one_line(text: str, longest: int = 60) -> str:
    """The start of a text, its white space made single spaces."""
    flat = " ".join(text.split())
    return flat if len(flat) <= longest else f"{flat[: longest - 1]}…"


def log_to_stderr() -> None:
    """loragen's warnings as `warning: ...` lines, once per process."""
    logger = logging.getLogger("loragen")
    if not logger.handlers:
        logger.addHandler(_StderrHandler())
        logger.setLevel(logging.INFO)
        logger.propagate = False


class _StderrHandler(logging.Handler):
    """Writes to the stderr of the moment, which a test or a pipe may have replaced."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        print(f"{prefix}{record.getMessage()}", file=sys.stderr, flush=True)


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
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
