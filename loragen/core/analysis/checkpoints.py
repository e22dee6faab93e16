"""What is at a path: collections of checkpoints, each checkpoint's ΔW with its own scaling."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from loragen.core.adapter import CONFIG_FILE, WEIGHTS_FILE
from loragen.core.adapter.algebra import Factors, modules
from loragen.core.adapter.files import module_scaling, read_adapter
from loragen.core.errors import LoragenError, UsageError
from loragen.core.files import natural_key
from loragen.core.run.checkpoints import find_checkpoints, read_tensors
from loragen.core.run.directory import CHECKPOINTS, LoraManifest, read_manifest, run_directory_of


@dataclass(frozen=True)
class CheckpointSeries:
    """Checkpoints that belong together, in the order of their steps."""

    name: str
    path: Path
    files: list[Path]


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one file, and what ΔW is made of."""

    tensors: dict[str, Tensor]
    config: dict[str, Any] | None
    """PEFT's configuration, None for a lone file; ΔW is then B A."""

    def scaling(self, module: str) -> float:
        return module_scaling(self.config, module) if self.config else 1.0

    def deltas(self) -> dict[str, Factors]:
        """Module -> (A, s·B): the scaling is in B, in float64, so that nothing is rounded."""
        return {
            name: (a, b.double() * self.scaling(name)) for name, (a, b) in modules(self.tensors)
        }


def find_series(paths: Sequence[Path]) -> list[CheckpointSeries]:
    """A run, a folder of checkpoints or adapters, one file: one collection. A folder of runs (or
    of folders of checkpoints): one for each that has checkpoints. No two have one name.

    Raises UsageError where there is nothing.
    """
    found = [collection for path in paths for collection in _find(path)]
    times = Counter(collection.name for collection in found)
    return [c if times[c.name] == 1 else replace(c, name=str(c.path)) for c in found]


def _find(path: Path) -> list[CheckpointSeries]:
    if not path.exists():
        raise UsageError(f"{path}: no checkpoints or adapters there")
    whole = _collection(path)
    if whole:
        return [whole]
    folders = sorted((p for p in path.iterdir() if p.is_dir()), key=lambda p: natural_key(p.name))
    found = [collection for folder in folders if (collection := _collection(folder))]
    if not found:
        raise UsageError(f"{path}: no checkpoints or adapters there")
    return found


def read_checkpoint(file: Path) -> Checkpoint:
    """Raises DataError where the file does not load or holds no LoRA."""
    folder = file.parent if file.name == WEIGHTS_FILE else file
    if (folder / CONFIG_FILE).is_file():
        adapter = read_adapter(folder)
        return Checkpoint(adapter.tensors, adapter.config)
    return Checkpoint(read_tensors(file), _run_config(file))


def _collection(path: Path) -> CheckpointSeries | None:
    whole = path.absolute()
    name = whole.parent.name if whole.name == CHECKPOINTS else whole.name
    try:
        return CheckpointSeries(name, path, find_checkpoints(path))
    except UsageError:
        return None


def _run_config(file: Path) -> dict[str, Any] | None:
    try:
        return read_manifest(run_directory_of(file), LoraManifest).adapter_config
    except LoragenError:  # a lone file that no run knows
        return None
