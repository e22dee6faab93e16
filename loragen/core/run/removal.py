"""Removing a run, or all but what it has made. What loragen has not written stays.

loragen's are the files by the names that trainings and loggers give theirs, and those of adapter/
that are as its card records them.
"""

import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from loragen.core.adapter import adapter_record
from loragen.core.errors import LoragenError, UsageError
from loragen.core.files import UNFINISHED, sha256
from loragen.core.run import (
    BEST_CHECKPOINT,
    CHECKPOINTS,
    CONFIG,
    GENERATOR_FILE,
    LAST_CHECKPOINT,
    MANIFEST,
)
from loragen.core.run.lock import LOCK, WRITER, RunLock
from loragen.core.run.metrics import METRICS

ADAPTER = "adapter"
LOCKS = (LOCK, WRITER)
OWN = (
    CONFIG,
    METRICS,
    LAST_CHECKPOINT.as_posix(),
    f"{CHECKPOINTS}/{BEST_CHECKPOINT}",
    GENERATOR_FILE.as_posix(),
    GENERATOR_FILE.with_suffix(".collected.safetensors").as_posix(),
    "final_model/config.json",
    "final_model/generation_config.json",
    "final_model/model*.safetensors",
    "final_model/model.safetensors.index.json",
    "final_model/chat_template.jinja",
    "final_model/tokenizer*",
    "final_model/special_tokens_map.json",
    "final_model/added_tokens.json",
    "final_model/vocab.*",
    "final_model/merges.txt",
    "tracking/*checkpoint_mapping_*.json",
    "tracking/batch_tracking_*.jsonl",
    "tensorboard_logs/events.out.tfevents.*",
    "tensorboard_logs/hparams.yaml",
    "csv_logs/metrics.csv",
    "csv_logs/hparams.yaml",
    "swanlab_logs/.gitignore",
    "mlflow_logs/mlflow.db",
    "trackio_logs/*.db",
    "trackio_logs/*.lock",
)
"""Patterns of files below a run directory; of a `*`, also a `/` is one."""
OWN_FOLDERS = (
    f".*{UNFINISHED}",
    f"*/.*{UNFINISHED}",
    "swanlab_logs/run-*",
    "wandb_logs/wandb",
    "mlflow_logs/mlruns",
    "mlflow_logs/mlartifacts",
)
"""Patterns of directories that are loragen's, or a logger's, with all that is in them."""


@dataclass(frozen=True)
class Removal:
    """What is to be removed of a run."""

    directory: Path
    files: list[Path]
    kept: list[Path]
    """What else is there, such as files of the user."""
    checkpoints_only: bool

    @property
    def size(self) -> int:
        """The bytes that are freed, unless a file has another name elsewhere."""
        return sum(file.lstat().st_size for file in self.files)

    def run(self) -> None:
        """Removes the files, the manifest last, and then the directories that are empty.

        Raises UsageError if the run is being written, or cannot be.
        """
        lock = RunLock(self.directory).acquire()
        try:
            for file in self.files:
                file.unlink(missing_ok=True)
            if not self.checkpoints_only:
                (self.directory / MANIFEST).unlink(missing_ok=True)
        except OSError as error:
            raise LoragenError(f"{error.filename}: cannot be removed: {error.strerror}") from None
        finally:
            lock.release()
        if self.checkpoints_only:
            return
        for name in LOCKS:
            (self.directory / name).unlink(missing_ok=True)
        for folder, _, _ in os.walk(self.directory, topdown=False):
            relative = Path(folder).relative_to(self.directory)
            own = any(relative in file.relative_to(self.directory).parents for file in self.files)
            if own or relative.as_posix() == CHECKPOINTS or _in_own_folder(relative.as_posix()):
                with suppress(OSError):  # something else is in it
                    Path(folder).rmdir()
        with suppress(OSError):
            self.directory.rmdir()


def plan_removal(directory: Path, kind: str, finished: bool, checkpoints_only: bool) -> Removal:
    """Returns what is to be removed of a run of `lora train` or `gen train` (`kind`).

    With `checkpoints_only` these are the checkpoints but the last of an adapter, from which an
    unfinished training also resumes, and all of a generator that has its file. Raises UsageError if
    the directory is a link.
    """
    if directory.is_symlink():
        raise UsageError(f"{directory} is a link; name the run itself: {directory.resolve()}")
    ours = _ownership(directory)
    files, kept = list[Path](), list[Path]()
    for folder, folders, names in os.walk(directory):
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        for name in (*names, *links):
            path = Path(folder) / name
            relative = path.relative_to(directory).as_posix()
            if relative not in (MANIFEST, *LOCKS):
                (files if ours(relative) else kept).append(path)
    if not checkpoints_only:
        return Removal(directory, sorted(files), sorted(kept), checkpoints_only)
    checkpoints = [file for file in files if file.parent == directory / CHECKPOINTS]
    removed = list[Path]()
    if kind == "lora":
        steps = sorted((_step(file.name), file) for file in checkpoints if _step(file.name))
        removed = [file for _, file in steps[:-1]]
        if steps and finished:
            removed += [file for file in checkpoints if file.name == LAST_CHECKPOINT.name]
    elif finished and (directory / GENERATOR_FILE).is_file():
        removed = checkpoints
    return Removal(directory, sorted(removed), [], checkpoints_only)


def _ownership(directory: Path) -> Callable[[str], bool]:
    """Returns what tells of a path below the run whether it is loragen's."""
    adapter = directory / ADAPTER
    record = {} if adapter.is_symlink() else adapter_record(adapter) or {}
    intact = {
        f"{ADAPTER}/{name}"
        for name, digest in record.items()
        if (adapter / name).is_file() and (digest is None or sha256(adapter / name) == digest)
    }

    def is_ours(relative: str) -> bool:
        return (
            relative in intact
            or any(fnmatchcase(relative, pattern) for pattern in OWN)
            or any(_in_own_folder(str(parent)) for parent in PurePosixPath(relative).parents)
            or (str(PurePosixPath(relative).parent) == CHECKPOINTS and bool(_step(relative)))
        )

    return is_ours


def _in_own_folder(relative: str) -> bool:
    return any(fnmatchcase(relative, pattern) for pattern in OWN_FOLDERS)


def _step(name: str) -> int:
    """Returns the step of a checkpoint that has the name that loragen gives it; 0 for a copy that
    the user has put beside it."""
    found = re.fullmatch(r"(?:.*/)?checkpoint-step-(\d{3,})\.ckpt", name)
    return int(found[1]) if found else 0
