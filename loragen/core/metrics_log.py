"""The local log that every run keeps: one JSON object a line, whatever becomes of the loggers."""

import json
from collections.abc import Iterator, Mapping
from math import isfinite, nan
from pathlib import Path
from typing import Any

from loragen.core.files import written_atomically

METRICS = "metrics.jsonl"


class StepLog:
    """Appends to `file`, one JSON object with a `step` a line.

    A run that goes on after `resume_step` drops what was written of later steps.
    """

    def __init__(self, file: Path, resume_step: int = 0) -> None:
        self.file = file
        if file.exists():
            _cut_back(file, resume_step)

    def append(self, entry: Mapping[str, Any]) -> None:
        """One line, on the disk once this returns. Raises OSError."""
        self.file.parent.mkdir(exist_ok=True)
        with self.file.open("ab") as file:  # nothing stays open: a kill loses nothing
            file.write((json.dumps(entry) + "\n").encode())


class MetricsLog(StepLog):
    """The log of `train/loss` and its like."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """What is not finite becomes null: JSON has no word for it."""
        values = {name: value if isfinite(value) else None for name, value in metrics.items()}
        self.append({"step": step, **values})


def read_metrics(file: Path) -> list[dict[str, float]]:
    """The entries in the order they were logged, each with its `step`; null is nan again.

    The torn last line of a run that was killed, or is still going on, is left out.
    """
    return [
        {name: nan if value is None else value for name, value in entry.items()}
        for _, entry in _entries(file.read_bytes())
    ]


def metrics_after(file: Path, step: int, tail: int = 65536) -> list[dict[str, float]]:
    """The entries of later steps, out of the last `tail` bytes; none where there is no file."""
    if not file.is_file():
        return []
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - tail))
        content = opened.read()
    return [
        {name: nan if value is None else value for name, value in entry.items()}
        for _, entry in _entries(content)
        if entry["step"] > step
    ]


def _cut_back(file: Path, step: int) -> None:
    entries = _entries(file.read_bytes())
    kept = [line + b"\n" for line, entry in entries if entry["step"] <= step]
    with written_atomically(file) as temporary:
        temporary.write_bytes(b"".join(kept))


def _entries(content: bytes) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each line that is an entry, and what it says."""
    for line in content.split(b"\n"):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and type(entry.get("step")) is int:
            yield line, entry
