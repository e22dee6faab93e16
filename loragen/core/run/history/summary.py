"""A run in one line: what it learns, how far it got, its best metric, its size.

Everything is read from the files of the run as they are. A manifest that is damaged, or newer than
this loragen, makes a line that says so, since a listing that leaves runs out cannot be trusted.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from math import isfinite, isnan
from pathlib import Path
from typing import Any, Literal

from loragen.core.run import COMMANDS, FORMAT_VERSION, MANIFEST
from loragen.core.run.metrics import METRICS, metric_entries

State = Literal["running", "finished", "failed", "interrupted", "unreadable"]
STATES: tuple[State, ...] = ("running", "finished", "failed", "interrupted", "unreadable")
ENDED: dict[str, State] = {"success": "finished", "failed": "failed", "interrupted": "interrupted"}
"""{status of a manifest: the state that it means}"""
LOSS = "train/loss"
UNITS = ((86400 * 2, 86400, "d"), (3600 * 2, 3600, "h"), (120, 60, "min"))
"""(from so many seconds on, seconds of the unit, its name)"""
OLD_METRICS = ("val_unseen/behaviour", "val_unseen/loss", "val/behaviour", "val/loss")
"""By which metric a run has chosen its step, in this order, if its manifest does not say."""


@dataclass(frozen=True)
class Summary:
    """What a listing shows of a run, and keeps in its index."""

    kind: str = ""
    """`lora` or `generator`."""
    status: str = ""
    """That of the manifest, which stays `running` if the process is killed."""
    started: str = ""
    """UTC, ISO 8601."""
    seconds: float | None = None
    datasets: tuple[str, ...] = ()
    """The dataset of a `lora train`, those that a `gen train` learns from."""
    base_model: str = ""
    step: int = 0
    """The last optimizer step that was logged."""
    max_steps: int = 0
    """The planned steps; 0 if they are not known."""
    metric: str = ""
    """The metric that is validated, else `train/loss`."""
    best: float | None = None
    """Its lowest value; of `train/loss`, whose values are of a few rows each, the last one."""
    best_step: int = 0
    size: int = 0
    """Bytes of all files in the directory."""
    problem: str = ""
    """Why the manifest cannot be read."""

    @property
    def command(self) -> str:
        return COMMANDS.get(self.kind, "")


@dataclass(frozen=True)
class ListedRun(Summary):
    """A run where it lies, as it is at this moment."""

    path: Path = Path()
    state: State = "unreadable"
    writer: str | None = None
    """The process that writes it: `process 123 on host`."""

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def age(self) -> float:
        """Seconds since it was started; NaN if that is not known."""
        try:
            return datetime.now().astimezone().timestamp() - _time(self.started)
        except ValueError:
            return float("nan")

    def document(self) -> dict[str, Any]:
        """Returns what `--json` prints of it."""
        return {
            "name": self.name,
            "path": str(self.path),
            "state": self.state,
            "writer": self.writer,
            "command": self.command,
            "status": self.status,
            "started": self.started,
            "age_seconds": self.age,
            "seconds": self.seconds,
            "datasets": list(self.datasets),
            "base_model": self.base_model,
            "step": self.step,
            "max_steps": self.max_steps or None,
            "metric": self.metric or None,
            "best": self.best,
            "best_step": self.best_step or None,
            "size_bytes": self.size,
            "problem": self.problem or None,
        }


def summarize(directory: Path) -> Summary:
    """Reads the files of a run. Raises FileNotFoundError if there is no manifest (any more)."""
    size = size_on_disk(directory)
    try:
        content = (directory / MANIFEST).read_bytes()
        manifest = json.loads(content)
        if not isinstance(manifest, dict) or manifest.get("kind") not in COMMANDS:
            raise ValueError("not the manifest of a run")
    except FileNotFoundError:
        raise
    except OSError as error:
        return Summary(size=size, problem=f"cannot be read: {error.strerror}")
    except (ValueError, RecursionError) as error:
        return Summary(size=size, problem=f"damaged: {error}")
    version = manifest.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        problem = f"format {version} is newer than this loragen reads ({FORMAT_VERSION})"
        return Summary(size=size, problem=problem)
    kind, dataset, records = (manifest.get(k) for k in ("kind", "dataset", "source_records"))
    datasets = [dataset] if kind == "lora" else records if isinstance(records, list) else []
    named = [d for d in datasets if isinstance(d, dict) and not d.get("held_out")]
    chosen = _text(manifest.get("selection_metric")) if kind == "generator" else ""
    progress = _progress(directory / METRICS, chosen)
    if not progress["step"] and isinstance(manifest.get("steps"), list):  # a converted run
        progress["step"] = max(filter(_is_number, manifest["steps"]), default=0)
    return Summary(
        kind=str(kind),
        status=_text(manifest.get("status")),
        started=_text(manifest.get("started")),
        seconds=_number(manifest.get("seconds")),
        datasets=tuple(_text(d.get("name")) for d in named),
        base_model=_text(manifest.get("base_model")),
        max_steps=int(_number(manifest.get("max_steps")) or 0),
        size=size,
        **progress,
    )


def listed(directory: Path, summary: Summary) -> ListedRun:
    """Returns the run with its state. A process that is gone without a word is no running one: its
    run was interrupted, and can be resumed."""
    state, writer = ENDED.get(summary.status, "unreadable"), None
    if summary.status == "running":
        from loragen.core.run.lock import writer_of  # many listings need none

        writer = writer_of(directory)
        state = "running" if writer else "interrupted"
    values = {**vars(summary), "path": directory, "state": state, "writer": writer}
    return ListedRun(**values)


def size_on_disk(directory: Path | str) -> int:
    """Returns the bytes of all files below a directory. Links lead to the files of others; a file
    that has two names counts once."""
    total, seen, folders = 0, set(), [os.fspath(directory)]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                        continue
                    found = entry.stat(follow_symlinks=False)
                    if found.st_nlink > 1:
                        if (found.st_dev, found.st_ino) in seen:
                            continue
                        seen.add((found.st_dev, found.st_ino))
                    total += found.st_size
        except OSError:  # removed meanwhile, or another user's
            continue
    return total


def size_text(size: float) -> str:
    units = ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.3g} {units[0]}"


def duration_text(seconds: float) -> str | None:
    if isnan(seconds):
        return None
    for least, length, unit in UNITS:
        if seconds >= least:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _progress(file: Path, chosen: str) -> dict[str, Any]:
    """Returns `step`, `metric`, `best` and `best_step`. Only the lines of validations and the last
    step are decoded: a run may have logged a hundred thousand others."""
    found: dict[str, Any] = {"step": 0, "metric": chosen, "best": None, "best_step": 0}
    try:
        content = file.read_bytes()
    except OSError:
        return found
    lines = content[: content.rfind(b"\n") + 1]
    validations = [entry for _, entry in metric_entries(b"\n".join(_lines_with(lines, b'"val')))]
    names = [chosen] if chosen else [n for n in OLD_METRICS if any(n in v for v in validations)]
    for name in names[:1]:
        for entry in validations:
            value = _number(entry.get(name))
            if value is not None and (found["best"] is None or value < found["best"]):
                found |= {"metric": name, "best": value, "best_step": entry["step"]}
    last = next(_last_entries(lines, LOSS), None)
    if last is not None:
        found["step"] = last["step"]
        if not names:
            found |= {"metric": LOSS, "best": _number(last[LOSS]), "best_step": last["step"]}
    return found


def _lines_with(content: bytes, text: bytes) -> list[bytes]:
    """Returns the lines that hold a text."""
    found, at = [], content.find(text)
    while at >= 0:
        end = content.find(b"\n", at)
        found.append(content[content.rfind(b"\n", 0, at) + 1 : end])
        at = content.find(text, end)
    return found


def _last_entries(content: bytes, name: str) -> Any:
    """Yields the entries with a metric, from the last one on."""
    end = len(content)
    while end > 0:
        start = content.rfind(b"\n", 0, end - 1) + 1
        for _, entry in metric_entries(content[start:end]):
            if name in entry:
                yield entry
        end = start


def _time(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _number(value: Any) -> float | None:
    return value if _is_number(value) else None


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def as_record(summary: Summary) -> dict[str, Any]:
    """Returns a summary as the index keeps it."""
    return asdict(summary)


def from_record(record: Mapping[str, Any]) -> Summary:
    return Summary(**{**record, "datasets": tuple(record["datasets"])})
