"""Checkpoints as ΔW = scaling · B A: finding, reading, and comparison by inner products."""

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loragen.core.adapter import CONFIG_FILE
from loragen.core.adapter.algebra import Factors, inner_products, modules
from loragen.core.adapter.checks import check_ba, module_scaling
from loragen.core.analysis.report import PrincipalComponents
from loragen.core.errors import LoragenError, UsageError
from loragen.core.files import natural_key
from loragen.core.hub import base_name
from loragen.core.run.checkpoints import load_adapter
from loragen.core.run.directory import (
    CHECKPOINTS,
    LoraManifest,
    find_checkpoints,
    read_manifest,
    run_directory_of,
)

LOADED_BYTES = 2**30
"""The memory for checkpoints whose inner products are computed, two blocks of them at a time. Any
number is compared in this memory; the larger they are, the more often each is read."""
MOST_AXES = 3
RESOLUTION = 1e-12
"""Share of Σ‖ΔW‖² below which the variance between checkpoints is rounding error."""


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one checkpoint, with the scaling of ΔW."""

    tensors: dict[str, Tensor]
    config: dict[str, Any] | None
    """PEFT's configuration; None for a file without a run, whose ΔW is taken as B A."""

    def scaling(self, module: str) -> float:
        return module_scaling(self.config, module) if self.config else 1.0

    def deltas(self) -> dict[str, Factors]:
        """Returns {module: (A, s·B)}; the scaling is in B, in float64, so nothing is rounded."""
        return {
            name: (a, b.double() * self.scaling(name)) for name, (a, b) in modules(self.tensors)
        }


@dataclass(frozen=True)
class CheckpointSeries:
    """The checkpoints of one run or directory, in the order of their steps."""

    name: str
    path: Path
    files: list[Path]
    config: dict[str, Any] | None = None
    """PEFT's configuration in the manifest of their run; None if there is no run."""

    def read(self, file: Path) -> Checkpoint:
        """Reads a PEFT directory or its weights file with its own configuration, others with that
        of the series. Raises DataError if the file does not load, has no LoRA tensors, or changes
        the base by more than BA."""
        adapter = load_adapter(file, self.config)
        check_ba(adapter.config, adapter.tensors, file)
        return Checkpoint(adapter.tensors, adapter.config or None)


def find_series(paths: Sequence[Path]) -> list[CheckpointSeries]:
    """Finds one series at each run, folder of checkpoints or adapters, or file, and one for each
    run or such folder in a folder. All names differ.

    Raises UsageError for a path without checkpoints.
    """
    found: list[CheckpointSeries] = []
    for path in paths:
        here = [_series_at(path)]
        if here == [None] and path.is_dir():
            folders = [folder for folder in path.iterdir() if folder.is_dir()]
            here = [_series_at(f) for f in sorted(folders, key=lambda f: natural_key(f.name))]
        if not any(here):
            raise UsageError(f"{path}: no checkpoints or adapters there")
        found += [series for series in here if series]
    times = Counter(series.name for series in found)
    return [s if times[s.name] == 1 else replace(s, name=str(s.path)) for s in found]


def _series_at(path: Path) -> CheckpointSeries | None:
    try:
        files = find_checkpoints(path)
    except UsageError:
        return None
    config = None
    if not (files[0] / CONFIG_FILE).is_file():
        with suppress(LoragenError):  # the files may belong to no run
            config = read_manifest(run_directory_of(files[0]), LoraManifest).adapter_config
    whole = path.absolute()
    name = base_name(whole.parent if whole.name == CHECKPOINTS else whole)
    return CheckpointSeries(name, path, files, config)


def evenly_spaced(files: Sequence[Path], most: int) -> list[Path]:
    """Returns at most `most` evenly spaced files with the first and the last; of one, the last."""
    if len(files) <= most:
        return list(files)
    if most == 1:
        return [files[-1]]
    return [files[round(i * (len(files) - 1) / (most - 1))] for i in range(most)]


Scaled = dict[str, tuple[Tensor, Tensor, float]]
"""{module: (A, B, scaling)} in the dtype of the file, at most half the memory of float64."""


def inner_product_matrix(files: Sequence[tuple[CheckpointSeries, Path]]) -> Tensor:
    """Returns ``[n, n]`` in float64: ⟨ΔWᵢ, ΔWⱼ⟩ over all modules.

    The checkpoints have the same modules and sizes; ranks and scalings may differ.
    """

    def read(i: int) -> Scaled:
        series, file = files[i]
        checkpoint = series.read(file)
        factors = modules(checkpoint.tensors)
        return {name: (a, b, checkpoint.scaling(name)) for name, (a, b) in factors}

    size = max(1, sum(a.nbytes + b.nbytes for a, b, _ in read(0).values()))
    step = max(1, LOADED_BYTES // (2 * size))
    blocks = [range(i, min(i + step, len(files))) for i in range(0, len(files), step)]
    result = torch.empty(len(files), len(files), dtype=torch.float64)
    for number, rows in enumerate(blocks):
        loaded = [read(i) for i in rows]
        for columns in blocks[: number + 1]:
            others = loaded if columns == rows else [read(j) for j in columns]
            products = _block(loaded, others)
            result[rows.start : rows.stop, columns.start : columns.stop] = products
            result[columns.start : columns.stop, rows.start : rows.stop] = products.T
    return result


def _block(one: Sequence[Scaled], other: Sequence[Scaled]) -> Tensor:
    """Returns ``[n, m]``; only one module at a time is converted to float64."""
    total = torch.zeros(len(one), len(other), dtype=torch.float64)
    for module in one[0]:
        rows, columns = ([checkpoint[module] for checkpoint in of] for of in (one, other))
        scalings = (
            torch.tensor([s for *_, s in of], dtype=torch.float64) for of in (rows, columns)
        )
        products = inner_products([(a, b) for a, b, _ in rows], [(a, b) for a, b, _ in columns])
        total += torch.outer(*scalings) * products
    return total


def cosines(products: Tensor) -> Tensor:
    """Returns the ``[n, n]`` cosines of inner products; NaN if a ΔW is zero."""
    norms = products.diagonal().clamp(min=0).sqrt()
    return (products / torch.outer(norms, norms)).clamp(-1, 1)


def principal_components(products: Tensor) -> PrincipalComponents | None:
    """Returns the PCA of ΔW from inner products G.

    With H = 1 - 11ᵀ/n, the eigenvectors of H G H, times √λ, are the coordinates of the centred ΔW
    on their principal axes.

    An axis points from the first checkpoint towards the last. Returns None if all are equal within
    rounding.
    """
    centred = products - products.mean(0) - products.mean(1, keepdim=True) + products.mean()
    values, vectors = torch.linalg.eigh((centred + centred.T) / 2)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    if values.sum() <= RESOLUTION * products.trace():
        return None
    axes = min(MOST_AXES, len(products) - 1)
    coordinates = vectors[:, :axes] * values[:axes].sqrt()
    backwards = coordinates[-1] < coordinates[0]
    coordinates = torch.where(backwards, -coordinates, coordinates)
    return PrincipalComponents((values[:axes] / values.sum()).tolist(), coordinates.tolist())
