"""Traditional experiments on disk: which directories are runs, what in them is a checkpoint."""

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from loragen.core.errors import UsageError, listing
from loragen.core.files import natural_key
from loragen.core.run.directory import CHECKPOINTS, MANIFEST

log = logging.getLogger(__name__)

MODELS = "models"
SUFFIXES = {".bin", ".ckpt", ".pt", ".pth", ".safetensors"}
NOT_WEIGHTS = re.compile(
    r"(optimizer|scheduler|scaler|rng_state|random_states|training_args)[._-]", re.IGNORECASE
)
# What PEFT and the Hugging Face Trainer put into a directory, best first; models may be in shards.
DIRECTORY_WEIGHTS = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "model.safetensors",
    "model-?????-of-?????.safetensors",
    "pytorch_model.bin",
    "pytorch_model-?????-of-?????.bin",
)
STEP = re.compile(r"steps?[_=-]?(\d{1,7})(?!\d)", re.IGNORECASE)
NUMBER = re.compile(r"(?:checkpoint|ckpt|iter|iteration)[_=-]?(\d{1,7})(?!\d)", re.IGNORECASE)
RESULT = re.compile(r"final|last|best|adapter|model", re.IGNORECASE)
STAMP = re.compile(r"\d{8}_\d{6}")


@dataclass(frozen=True)
class LegacyRun:
    """A traditional run directory, or a bare folder of checkpoints."""

    directory: Path
    entries: list[Path]
    """Checkpoints, files or directories, as found; some may have no step."""
    traditional: bool
    """It has the parts checkpoints/ or models/: the folder around it is named after the dataset."""
    lone: bool = False
    """One file that was named: what lies beside it may be of other trainings."""

    @property
    def source(self) -> Path:
        """What is converted."""
        return self.entries[0] if self.lone else self.directory

    @property
    def started(self) -> datetime | None:
        """The local time in the directory's name."""
        for text in STAMP.findall(self.directory.absolute().name):
            try:
                return datetime.strptime(text, "%Y%m%d_%H%M%S").astimezone()
            except ValueError:
                continue
        return None

    @property
    def logs(self) -> Path:
        logs = self.directory / "logs"
        return logs if logs.is_dir() else self.directory


def find_runs(source: Path) -> list[LegacyRun]:
    """The runs at and below `source`.

    Raises UsageError where there is nothing to convert.
    """
    if not source.exists():
        raise UsageError(f"{source}: no such file or directory")
    if source.is_file():
        return [LegacyRun(source.parent, [source], traditional=False, lone=True)]
    alone = source.name in {CHECKPOINTS, MODELS}  # the other may hold the base
    if source.is_symlink() and not alone:
        source = source.resolve()  # one run has one name
    runs = list(_runs(source.parent, source) if alone else _runs(source))
    if not runs:
        raise UsageError(
            f"{source}: nothing to convert: no checkpoints ({', '.join(sorted(SUFFIXES))}) in "
            f"{CHECKPOINTS}/, {MODELS}/ or in the folder itself"
        )
    return runs


def _runs(directory: Path, part: Path | None = None) -> Iterator[LegacyRun]:
    """The run that a directory is, or those below it; of a `part` that one alone."""
    if (directory / MANIFEST).is_file():
        log.warning("%s: is one of loragen's own directories already; left alone", directory)
        return
    places = [part] if part else [directory / CHECKPOINTS, directory / MODELS]
    if entries := [entry for place in places for entry in _entries(place)]:
        yield LegacyRun(directory, entries, traditional=True)
    elif part is None:
        yield from _bare_or_below(directory)


def _bare_or_below(directory: Path) -> Iterator[LegacyRun]:
    """A stray best.pt does not make a run of a folder that has runs below."""
    entries = list(_entries(directory, deep=False))
    if any(entry.is_dir() for entry in entries):
        yield LegacyRun(directory, entries, traditional=False)
        return
    below = [run for child in _subfolders(directory) for run in _runs(child)]
    if entries:
        below = [run for run in below if run.traditional or _numbered(run.entries)]
    if entries and below and not _numbered(entries):
        names = listing([entry.name for entry in entries], 4)
        log.warning("%s: left out, for there are runs below: %s", directory, names)
    elif entries:
        yield LegacyRun(directory, entries, traditional=False)
    yield from below


def _subfolders(directory: Path) -> Iterator[Path]:
    for child in _children(directory):
        if child.is_dir() and child.is_symlink():  # `latest`: a run that is found anyway
            log.info("%s: a link, left alone; name it to convert it", child)
        elif child.is_dir():
            yield child


def _numbered(entries: list[Path]) -> bool:
    return any(step_in_name(entry) is not None for entry in entries)


def _entries(directory: Path, deep: bool = True) -> Iterator[Path]:
    """The checkpoints in a folder; `deep` also those in folders that are none themselves."""
    own = set(_directory_weights(directory))
    if own:
        yield directory  # the result of a Trainer, with its checkpoint-N/ beside
    for child in _children(directory):
        if child.is_dir():
            if _is_checkpoint(child):
                yield child
            elif deep:
                yield from _entries(child)
        elif _is_weights(child) and child not in own:
            yield child


def _children(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    visible = (child for child in directory.iterdir() if not child.name.startswith("."))
    return sorted(visible, key=lambda child: natural_key(child.name))


def _is_checkpoint(directory: Path) -> bool:
    if _directory_weights(directory):
        return True
    return step_in_name(directory) is not None and len(_lone_weights(directory)) == 1


def weights_of(entry: Path) -> list[Path]:
    """The files that hold a checkpoint's weights; several where a model is in shards.

    Raises UsageError for a folder of several checkpoints.
    """
    if entry.is_file():
        return [entry]
    shards = _directory_weights(entry)
    lone = [] if shards else _lone_weights(entry)
    if len(lone) > 1:
        names = listing([file.name for file in lone], 4)
        raise UsageError(f"{entry}: {len(lone)} checkpoints in it, name one: {names}")
    return shards or lone


def _directory_weights(directory: Path) -> list[Path]:
    for pattern in DIRECTORY_WEIGHTS:
        if found := sorted(directory.glob(pattern)):
            return found
    return []


def _lone_weights(directory: Path) -> list[Path]:
    return [child for child in _children(directory) if child.is_file() and _is_weights(child)]


def _is_weights(file: Path) -> bool:
    return file.suffix in SUFFIXES and not NOT_WEIGHTS.match(file.name)


def step_in_name(entry: Path, sure: bool = False) -> int | None:
    """`step_080` -> 80; unless it has to be `sure`, also `checkpoint-80` and `80`."""
    name = entry.stem if entry.suffix in SUFFIXES else entry.name
    if found := STEP.findall(name):
        return int(found[-1])
    if sure:
        return None
    if found := NUMBER.findall(name):
        return int(found[-1])
    return int(name) if re.fullmatch(r"\d{1,7}", name) else None


def is_result(entry: Path) -> bool:
    """Named like the result of a training rather than one of its steps."""
    return entry.parent.name == MODELS or bool(RESULT.search(entry.name))
