"""metrics.jsonl: one line for each step of a run and one for each validation."""

import json
import os
from collections.abc import Iterator
from math import nan
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"


def read_metrics(file: Path) -> list[dict[str, float]]:
    """Returns the entries in the order they were logged, each with its `step`; null becomes NaN.

    The incomplete last line of a run that was killed or is still running is left out.
    """
    return [_with_nan(entry) for _, entry in metric_entries(file.read_bytes())]


def metric_entries(content: bytes) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yields each line that is an entry, with the entry."""
    for line in content.split(b"\n"):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and type(entry.get("step")) is int:
            yield line, entry


class MetricsReader:
    """Reads the file of a run that may be in training, also of one on another machine: it asks for
    what was added, and needs no notice of it."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.entries: list[dict[str, float]] = []
        """All entries so far."""
        self._read, self._identity = 0, (0, 0)

    def new_entries(self) -> list[dict[str, float]]:
        """Returns the entries of the complete lines since the last call. A file that was replaced,
        as by a run that resumes, or cut is read from its start. A file that is missing, or cannot
        be read now, has none."""
        try:
            with self.file.open("rb") as stream:  # opened: NFS then asks the server
                found = os.fstat(stream.fileno())
                if (found.st_dev, found.st_ino) != self._identity or found.st_size < self._read:
                    self._read, self._identity = 0, (found.st_dev, found.st_ino)
                    self.entries.clear()
                stream.seek(self._read)
                added = stream.read()
        except OSError:
            return []
        whole = added[: added.rfind(b"\n") + 1]
        self._read += len(whole)
        new = [_with_nan(entry) for _, entry in metric_entries(whole)]
        self.entries += new
        return new


def _with_nan(entry: dict[str, Any]) -> dict[str, float]:
    return {
        name: nan if value is None else value
        for name, value in entry.items()
        if value is None or isinstance(value, int | float)
    }
