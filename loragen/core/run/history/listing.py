"""The runs of a folder, at once for those that were seen before.

What was read of each run is kept in `.loragen-runs.json` of the folder, under the times and sizes
by which a change of the run shows. The file is no source of anything: it is made again where it is
missing, damaged, of another version, or wrong about a run; where it cannot be written there is
none. Two processes that write it at once leave that of one of them, which is as good.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from loragen.core.errors import LoragenError, UsageError, did_you_mean
from loragen.core.files import written_atomically
from loragen.core.run import CHECKPOINTS, MANIFEST
from loragen.core.run.history.summary import (
    ListedRun,
    Summary,
    as_record,
    from_record,
    listed,
    summarize,
)
from loragen.core.run.metrics import METRICS

INDEX = ".loragen-runs.json"
FORM = "loragen runs 1"
"""The start of the file. Another summary of a run needs another number."""
SETTLED_SECONDS = 2.0
"""A run that has changed within so many seconds is not kept: it may change again within the same
tick of the file system's clock."""
READERS = 8
"""Threads that read the runs that are not known: on a shared folder, they mostly wait."""
DEFAULT_FOLDERS = {"LORAGEN_RUNS_DIR": "runs", "LORAGEN_EXPERIMENTS_DIR": "experiments"}
"""{variable: the folder in the working directory that it replaces}"""

Signature = tuple[int, ...]


def default_folders() -> list[Path]:
    """Returns the folders of runs and of experiments."""
    return [Path(os.environ.get(name) or folder) for name, folder in DEFAULT_FOLDERS.items()]


def list_runs(folders: Iterable[Path]) -> list[ListedRun]:
    """Returns the runs in each folder, or the run that it is, in the order of their names."""
    found = dict[Path, ListedRun]()
    for folder in folders:
        if (folder / MANIFEST).is_file():
            runs = [listed(folder, summarize(folder))]
        else:
            runs = [listed(folder / name, one) for name, one in sorted(_summaries(folder).items())]
        found |= {run.path: run for run in runs}
    return list(found.values())


def find_run(text: str) -> ListedRun:
    """Returns the run that a path or, in the default folders, a name means.

    Raises UsageError if there is none.
    """
    path = Path(text)
    candidates = [path, *(folder / text for folder in default_folders() if path.name == text)]
    for one in candidates:
        if (one / MANIFEST).is_file():
            with suppress(FileNotFoundError):
                return listed(one, summarize(one))
    if path.is_dir():
        inside = [run.name for run in list_runs([path])]
        raise UsageError(
            f"{path} is a folder of {len(inside)} runs; name one: {path / inside[-1]}"
            if inside
            else f"{path}: not a run directory (it has no {MANIFEST})"
        )
    names = [name for folder in default_folders() for name, _, _ in _run_directories(folder)]
    raise UsageError(f"{text}: no such run.{did_you_mean(path.name, names)}".removesuffix("."))


def _summaries(folder: Path) -> dict[str, Summary]:
    """Returns the runs of a folder by name, and renews its index if that lacks some."""
    index, now = _read_index(folder), time.time()
    known = dict[str, Summary]()
    unknown = list[tuple[str, str, Signature]]()
    for name, path, signature in _run_directories(folder):
        kept = index.get(name)
        if kept and kept[0] == list(signature):
            with suppress(TypeError, KeyError):
                known[name] = from_record(kept[1])
                continue
        unknown.append((name, path, signature))
    read = _read([path for _, path, _ in unknown])
    found = {**known, **{one[0]: new for one, new in zip(unknown, read, strict=True) if new}}
    settled = {
        name: [list(signature), as_record(new)]
        for (name, _, signature), new in zip(unknown, read, strict=True)
        if new and max(signature[0], signature[1], *signature[3:5]) / 1e9 < now - SETTLED_SECONDS
    }
    if settled or len(index) > 2 * len(known):  # many of it are gone
        _write_index(folder, {**{name: index[name] for name in known}, **settled})
    return found


def _run_directories(folder: Path) -> list[tuple[str, str, Signature]]:
    """Returns (name, path, signature) of each run directory in a folder. The signature has the
    times (ns) of the directory, of its manifest and of its checkpoints/, and the sizes of the
    manifest and of what was logged."""
    found: list[tuple[str, str, Signature]] = []
    try:
        names = sorted(os.listdir(folder))  # noqa: PTH208  # 5,000 names in a millisecond
    except OSError:
        return []
    for name in names:
        path = os.path.join(folder, name)  # noqa: PTH118  # as above
        try:
            manifest = os.stat(f"{path}/{MANIFEST}")  # noqa: PTH116
            own = os.stat(path)  # noqa: PTH116
        except (OSError, ValueError):
            continue
        times, sizes = [own.st_mtime_ns, manifest.st_mtime_ns], [manifest.st_size]
        for other in (CHECKPOINTS, METRICS):
            try:
                stat = os.stat(f"{path}/{other}")  # noqa: PTH116
            except OSError:
                times.append(0)
                sizes.append(0)
                continue
            times.append(stat.st_mtime_ns)
            sizes.append(stat.st_size if other == METRICS else 0)
        found.append((name, path, (times[0], times[1], sizes[0], times[2], times[3], sizes[2])))
    return found


def _read(paths: Sequence[str]) -> list[Summary | None]:
    """Returns the summaries of runs; None for one that is removed at this moment."""

    def read(path: str) -> Summary | None:
        try:
            return summarize(Path(path))
        except FileNotFoundError:
            return None

    if len(paths) < 2 * READERS:
        return [read(path) for path in paths]
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(read, paths, chunksize=1))


def _read_index(folder: Path) -> dict[str, list[Any]]:
    """Returns {name: [signature, record]}; empty if the file is not as it was written."""
    try:
        head, _, body = (folder / INDEX).read_bytes().partition(b"\n")
        if head.decode() != f"{FORM} {hashlib.sha256(body).hexdigest()}":
            return {}
        return dict(json.loads(body))
    except (OSError, ValueError):
        return {}


def _write_index(folder: Path, index: dict[str, list[Any]]) -> None:
    body = json.dumps(index, separators=(",", ":")).encode()
    content = f"{FORM} {hashlib.sha256(body).hexdigest()}\n".encode() + body
    # A read-only folder, or a full disk: it is not needed.
    with suppress(OSError, LoragenError), written_atomically(folder / INDEX) as temporary:
        temporary.write_bytes(content)
