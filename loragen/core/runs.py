"""Run directories: their names, and what is in them."""

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from loragen.core.config import LoraTrainConfig, load
from loragen.core.errors import UsageError
from loragen.core.manifests import (
    MANIFEST,
    GeneratorManifest,
    LoraManifest,
    Manifest,
    read_manifest,
)

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
ADAPTER_CONFIG = "adapter_config.json"
MERGED_MARKER = "loragen_export.json"  # tells a merged model of ours from any other
CHECKPOINT_SUFFIX = ".ckpt"
TEST_MODE_STEPS = (4, 5, 6)
"""The checkpoints of `lora train --test-mode`: three steps of each stage, those of the second."""
LAST_CHECKPOINT = Path("checkpoints/last.ckpt")
"""What a killed run goes on from; no part of the collection."""
BEST_CHECKPOINT = f"epoch=*{CHECKPOINT_SUFFIX}"
"""Of a generator's training: the best step so far, one file but for a moment."""
GENERATOR_FILE = Path("results/final_model/generator_model.pt")


@dataclass(frozen=True)
class LoraRun:
    """A run of one dataset."""

    directory: Path
    manifest: LoraManifest


def create_run_directory(parent: Path, prefix: str, started: datetime | None = None) -> Path:
    """`<parent>/<prefix>_<YYYYmmdd_HHMMSS>`, made here and by nobody else; `started` is now.

    Two runs of one second: the later takes `_2`, `_3`, ... Raises UsageError where it
    cannot be made.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{parent}: no directory for runs: {error.strerror}") from None
    name = f"{prefix}_{started or datetime.now().astimezone():%Y%m%d_%H%M%S}"
    attempt = 1
    while True:
        directory = parent / (name if attempt == 1 else f"{name}_{attempt}")
        try:
            directory.mkdir()
        except FileExistsError:
            attempt += 1
        except OSError as error:
            raise UsageError(f"{directory}: cannot be made: {error.strerror}") from None
        else:
            return directory


def read_run(directory: Path) -> tuple[LoraRun, LoraTrainConfig]:
    """A run and what it was configured with. Raises LoragenError where either is not ours."""
    manifest = read_manifest(directory, LoraManifest)
    return LoraRun(directory, manifest), load(LoraTrainConfig, directory / CONFIG, environment={})


def resumable_run(path: Path, kind: type[Manifest]) -> Path:
    """The directory of the run at `path`, or that the checkpoint `path` is of.

    Raises UsageError where there is none, DataError where it is a run of another kind.
    """
    if not path.exists():
        raise UsageError(f"{path}: no such run or checkpoint")
    directory = run_directory_of(path)
    read_manifest(directory, kind)
    return directory


def run_directory_of(path: Path) -> Path:
    """The run that `path` belongs to: the run itself, its checkpoints/, or a file in there."""
    for candidate in (path, *list(path.absolute().parents)[:2]):
        if (candidate / MANIFEST).is_file():
            return candidate
    raise UsageError(f"{path}: neither a run directory nor inside one (no {MANIFEST} found)")


def checkpoint_files(directory: Path) -> list[Path]:
    """The step checkpoints of a run (or of its checkpoints/ folder), in the order of steps."""
    folder = directory / CHECKPOINTS if (directory / CHECKPOINTS).is_dir() else directory
    found = (f for f in folder.glob(f"*{CHECKPOINT_SUFFIX}") if f.name != LAST_CHECKPOINT.name)
    return sorted(found, key=lambda file: (checkpoint_step(file), file.name))


def checkpoint_name(step: int) -> str:
    return f"checkpoint-step-{step:03d}{CHECKPOINT_SUFFIX}"


def checkpoint_step(file: Path) -> int:
    """The step that a checkpoint's name tells; 0 where it tells none."""
    digits = "".join(filter(str.isdigit, file.stem.rpartition("step-")[2] or file.stem))
    return int(digits) if digits else 0


def generator_file(path: Path) -> Path:
    """The generator_model.pt of an experiment directory, or the file itself; of an experiment that
    has none yet, its best checkpoint, or its last where nothing was validated.

    Raises UsageError where there is none.
    """
    file = path / GENERATOR_FILE if path.is_dir() else path
    if file.is_file():
        return file
    if not (path / MANIFEST).is_file():
        raise UsageError(f"{path}: no generator there (looked for {file})")
    kind = json.loads((path / MANIFEST).read_text(encoding="utf-8")).get("kind")
    if kind != "generator":
        raise UsageError(
            f"{path}: the run of an adapter, not of a generator: `gen train --checkpoint-dir` it"
        )
    best = sorted((path / CHECKPOINTS).glob(BEST_CHECKPOINT), key=lambda f: f.stat().st_mtime_ns)
    found = [*best[-1:], path / LAST_CHECKPOINT]
    if not found[0].is_file():
        raise UsageError(_why_no_generator(path))
    return found[0]


def _why_no_generator(run: Path) -> str:
    told = {
        "running": "is still in training, or was killed",
        "interrupted": "was interrupted",
        "failed": "has failed",
        "success": "has lost its generator",
    }[read_manifest(run, GeneratorManifest).status]
    return (
        f"{run}: no generator there, and no checkpoint: the experiment {told}; train it to the "
        f"end, `loragen gen train --resume {run}`, or name another"
    )


def experiment_name(file: Path) -> str:
    """What a generator's file is called by: its experiment's name, else its own."""
    for home in file.absolute().parents[:3]:
        if file.absolute() in (home / GENERATOR_FILE, home / CHECKPOINTS / file.name):
            return home.name
    return file.stem
