"""What the weights of a checkpoint or a whole collection are: norms, drift, damage.

Holds two checkpoints at a time, whatever the number of files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loragen.core.analysis.lora_algebra import Factors, distance, modules, norm
from loragen.core.checkpoints import find_checkpoints, read_checkpointed_adapter, read_tensors
from loragen.core.errors import DataError, LoragenError


@dataclass(frozen=True)
class ModuleNorms:
    """Frobenius norms of one module in the last checkpoint."""

    module: str
    rank: int
    norm_a: float
    norm_b: float
    norm_delta: float
    """‖ΔW‖ = scaling · ‖B A‖"""


@dataclass(frozen=True)
class Drift:
    """Where one checkpoint stands, over all modules together."""

    checkpoint: str
    norm_delta: float
    from_first: float
    """‖ΔW - ΔW of the first checkpoint‖"""
    from_previous: float
    """‖ΔW - ΔW of the checkpoint before‖: the length of this step of the path"""


@dataclass
class Report:
    path: str
    checkpoints: int
    bytes: int
    """Of all files together."""
    tensors: int
    values: int
    """Of one adapter."""
    dtypes: list[str]
    scaling: float | None
    """alpha / rank, None where the file does not say; ΔW is then B A."""
    modules: list[ModuleNorms] = field(default_factory=list)
    drift: list[Drift] = field(default_factory=list)
    not_finite: list[str] = field(default_factory=list)
    """`file: tensor` with NaN or infinity."""
    zero: list[str] = field(default_factory=list)
    """`file: tensor` with nothing but zeros."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def analyze(path: Path) -> Report:
    """A run, a folder of checkpoints or adapters, or one file.

    Raises UsageError where there is nothing, DataError where the checkpoints differ in shape.
    """
    files = find_checkpoints(path)
    scaling = _scaling(files[0])
    tensors = read_tensors(files[-1])
    report = Report(
        path=str(path),
        checkpoints=len(files),
        bytes=sum(_size(file) for file in files),
        tensors=len(tensors),
        values=sum(t.numel() for t in tensors.values()),
        dtypes=sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}),
        scaling=scaling,
        modules=module_norms(tensors, scaling or 1.0),
    )
    _walk(report, files, scaling or 1.0)
    return report


def module_norms(tensors: Mapping[str, Tensor], scaling: float) -> list[ModuleNorms]:
    return [
        ModuleNorms(
            module=name,
            rank=a.shape[0],
            norm_a=float(a.double().norm()),
            norm_b=float(b.double().norm()),
            norm_delta=scaling * norm((a, b)),
        )
        for name, (a, b) in modules(tensors)
    ]


def damage(tensors: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """(tensors with NaN or infinity, tensors that are zero throughout)."""
    not_finite = [key for key, t in tensors.items() if not torch.isfinite(t).all()]
    zero = [key for key, t in tensors.items() if not t.any()]
    return not_finite, zero


def _walk(report: Report, files: Sequence[Path], scaling: float) -> None:
    """Along the checkpoints in the order of their steps."""
    first = previous = None
    for file in files:
        tensors = read_tensors(file)
        not_finite, zero = damage(tensors)
        report.not_finite += [f"{file.name}: {key}" for key in not_finite]
        report.zero += [f"{file.name}: {key}" for key in zero]
        factors = dict(modules(tensors))
        first, previous = first or factors, previous or factors
        report.drift.append(
            Drift(
                checkpoint=file.name,
                norm_delta=scaling * _total(norm(f) for f in factors.values()),
                from_first=scaling * _apart(file, factors, first),
                from_previous=scaling * _apart(file, factors, previous),
            )
        )
        previous = factors


def _apart(file: Path, one: Mapping[str, Factors], other: Mapping[str, Factors]) -> float:
    if _shapes(one) != _shapes(other):
        raise DataError(f"{file}: other modules or shapes than the first checkpoint")
    return _total(distance(factors, other[name]) for name, factors in one.items())


def _shapes(factors: Mapping[str, Factors]) -> dict[str, tuple[torch.Size, torch.Size]]:
    return {name: (a.shape, b.shape) for name, (a, b) in factors.items()}


def _total(norms: Any) -> float:
    """The norm of the whole from the norms of its parts."""
    return float(sum(value**2 for value in norms) ** 0.5)


def _scaling(file: Path) -> float | None:
    try:
        config = read_checkpointed_adapter(file).config
    except LoragenError:  # a lone file that no run knows
        return None
    root = config["r"] ** 0.5 if config.get("use_rslora") else config["r"]
    return float(config["lora_alpha"] / root)


def _size(file: Path) -> int:
    files = file.iterdir() if file.is_dir() else [file]
    return sum(one.stat().st_size for one in files)
