"""What is found out about checkpoints, as plain data: what `--json` prints and the page shows."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite, nan
from typing import Any


@dataclass(frozen=True)
class ModuleReport:
    """One module of the last checkpoint. ΔW = scaling · B A; norms are Frobenius norms."""

    module: str
    layer: int
    """-1 where the module's path has no number."""
    kind: str
    """`self_attn.q_proj`: the path below the layer."""
    rank: int
    norm_a: float
    norm_b: float
    norm_delta: float
    sigma_1: float
    """The largest singular value of ΔW, its spectral norm."""
    stable_rank: float
    """‖ΔW‖² / σ₁²"""
    effective_rank: float
    """exp of the entropy of σ / Σσ"""


@dataclass(frozen=True)
class Drift:
    """Where one checkpoint stands, over all modules together."""

    checkpoint: str
    norm_delta: float
    from_first: float
    """‖ΔW - ΔW of the first checkpoint‖"""
    from_previous: float
    """‖ΔW - ΔW of the checkpoint before‖: the length of this step of the path"""


@dataclass(frozen=True)
class Trajectory:
    """The main axes along which the ΔW of several checkpoints differ."""

    shares: list[float]
    """Of the variance, one per axis, descending."""
    coordinates: list[list[float]]
    """``[checkpoints, axes]``, in the unit of ‖ΔW‖"""


@dataclass(frozen=True)
class ComparedCheckpoints:
    """Checkpoints compared each with each: all, or evenly spaced ones where there are many."""

    checkpoints: list[str]
    cosine: list[list[float]]
    """``[checkpoints, checkpoints]``, NaN for a ΔW that is zero"""
    pca: Trajectory | None
    """None where all are equal."""


@dataclass(frozen=True)
class Twins:
    """Checkpoints with the same tensors, bit for bit."""

    files: list[str]


@dataclass
class Report:
    """One collection."""

    name: str
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
    modules: list[ModuleReport] = field(default_factory=list)
    drift: list[Drift] = field(default_factory=list)
    path_length: float = 0.0
    """The sum of all steps."""
    displacement: float = 0.0
    """From the first to the last checkpoint as the crow flies."""
    sample: ComparedCheckpoints | None = None
    """None where fewer than two checkpoints are finite."""
    not_finite: list[str] = field(default_factory=list)
    """`file: tensor` with NaN or infinity."""
    zero: list[str] = field(default_factory=list)
    """`file: tensor` with nothing but zeros."""
    dead_layers: list[int] = field(default_factory=list)
    dead_modules: list[str] = field(default_factory=list)
    """Of the last checkpoint: ΔW (nearly) zero beside the others'."""

    @property
    def dead(self) -> list[str]:
        """Dead layers, and dead modules of layers that are alive, in words."""
        buried = {m.module for m in self.modules if m.layer in self.dead_layers}
        layers = [f"layer {layer}" for layer in self.dead_layers]
        return layers + [name for name in self.dead_modules if name not in buried]

    @property
    def norm_delta(self) -> float:
        """‖ΔW‖ of the last checkpoint."""
        return self.drift[-1].norm_delta

    @property
    def mean_norm(self) -> float:
        """‖ΔW‖, the mean over the checkpoints that are finite."""
        norms = [drift.norm_delta for drift in self.drift]
        return _mean([norm for norm in norms if isfinite(norm)])

    @property
    def detour(self) -> float | None:
        """Path length / displacement: 1 is a straight line. None where nothing moved."""
        return self.path_length / self.displacement if self.displacement else None

    @property
    def stable_rank(self) -> float:
        return _mean([module.stable_rank for module in self.modules])

    @property
    def effective_rank(self) -> float:
        """Mean over the modules of the last checkpoint."""
        return _mean([module.effective_rank for module in self.modules])


@dataclass(frozen=True)
class Comparison:
    """Collections whose ΔW have the same modules and sizes; the ranks may differ."""

    collections: list[str]
    cosine_last: list[list[float]]
    """``[collections, collections]``: between their last checkpoints' ΔW"""
    cosine_mean: list[list[float]]
    """The same between the means of ΔW over each collection's sample."""
    checkpoints: list[list[str]]
    """The sample of each collection."""
    pca: Trajectory | None
    """All samples in one space, one collection after the other."""


@dataclass
class Analysis:
    """Everything that was asked about."""

    collections: list[Report]
    comparisons: list[Comparison] = field(default_factory=list)
    """One for each group of two or more collections that can be compared."""
    not_compared: list[str] = field(default_factory=list)
    """`collection: why` it is in no comparison."""
    twins: list[Twins] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain data; what is derived (means, detour) stands beside what it comes from."""
        document = asdict(self)
        for plain, report in zip(document["collections"], self.collections, strict=True):
            plain |= {name: getattr(report, name) for name in DERIVED}
        return document


def by_tensor(found: Sequence[str]) -> list[str]:
    """`file: tensor` lines, those of one tensor in several files as one."""
    files: dict[str, list[str]] = {}
    for line in found:
        file, _, tensor = line.partition(": ")
        files.setdefault(tensor, []).append(file)
    return [
        f"{named[0]}: {tensor}"
        if len(named) == 1
        else f"{named[0]} to {named[-1]} ({len(named)}): {tensor}"
        for tensor, named in files.items()
    ]


DERIVED = ("norm_delta", "mean_norm", "detour", "stable_rank", "effective_rank")


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else nan
