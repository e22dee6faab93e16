"""The analysis of checkpoints as plain data: what `--json` prints and the page shows. Light."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite, nan
from typing import Any

JSON_KEYS = {"series": "collections", "duplicates": "twins"}
"""{field: its key in JSON documents}, which programs rely on."""


@dataclass(frozen=True)
class ModuleReport:
    """One module of the last checkpoint. ΔW = scaling · B A; norms are Frobenius norms."""

    module: str
    layer: int
    """-1 if the module's path has no number."""
    kind: str
    """The path below the layer, such as `self_attn.q_proj`."""
    rank: int
    scaling: float | None
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
    """The norm of one checkpoint and its distances from others, over all modules together."""

    checkpoint: str
    norm_delta: float
    from_first: float
    """‖ΔW - ΔW of the first checkpoint‖"""
    from_previous: float
    """‖ΔW - ΔW of the previous checkpoint‖: the length of this part of the path"""


@dataclass(frozen=True)
class PrincipalComponents:
    """The principal axes of the ΔW of several checkpoints, and their coordinates on these."""

    shares: list[float]
    """The share of the variance of each axis, descending."""
    coordinates: list[list[float]]
    """``[checkpoints, axes]``, in the unit of ‖ΔW‖"""


@dataclass(frozen=True)
class ComparedCheckpoints:
    """The checkpoints of a series that are compared in pairs; some of them, if there are many."""

    checkpoints: list[str]
    cosine: list[list[float]]
    """``[checkpoints, checkpoints]``, NaN for a ΔW that is zero"""
    pca: PrincipalComponents | None
    """None if all are equal."""


@dataclass(frozen=True)
class Duplicates:
    """Checkpoints with the same tensors, bit for bit."""

    files: list[str]


@dataclass
class SeriesReport:
    """One series of checkpoints."""

    name: str
    path: str
    checkpoints: int
    bytes: int
    """The size of all files together."""
    tensors: int
    values: int
    """The number of values of one adapter."""
    dtypes: list[str]
    scaling: float | None
    """alpha / rank of the whole adapter; None if it is not recorded, and ΔW is taken as B A."""
    modules: list[ModuleReport] = field(default_factory=list)
    drift: list[Drift] = field(default_factory=list)
    path_length: float = 0.0
    """The sum of the distances between successive checkpoints."""
    displacement: float = 0.0
    """The distance from the first to the last checkpoint."""
    sample: ComparedCheckpoints | None = None
    """None if fewer than two checkpoints are finite."""
    not_finite: list[str] = field(default_factory=list)
    """`file: tensor` with NaN or infinity."""
    zero: list[str] = field(default_factory=list)
    """`file: tensor` with nothing but zeros."""
    dead_layers: list[int] = field(default_factory=list)
    dead_modules: list[str] = field(default_factory=list)
    """Modules of the last checkpoint whose ΔW is (nearly) zero compared with the others'."""

    @property
    def dead(self) -> list[str]:
        """The dead layers, and the dead modules of other layers, for printing."""
        inside = {m.module for m in self.modules if m.layer in self.dead_layers}
        layers = [f"layer {layer}" for layer in self.dead_layers]
        return layers + [name for name in self.dead_modules if name not in inside]

    @property
    def scalings(self) -> list[float]:
        """The least and the greatest scaling of the modules, which patterns may have set apart; one
        if they are equal, none if they are not known."""
        found = [module.scaling for module in self.modules if module.scaling is not None]
        return sorted({min(found), max(found)}) if found else []

    @property
    def norm_delta(self) -> float:
        """‖ΔW‖ of the last checkpoint."""
        return self.drift[-1].norm_delta

    @property
    def mean_norm(self) -> float:
        """The mean of ‖ΔW‖ over the checkpoints that are finite."""
        norms = [drift.norm_delta for drift in self.drift]
        return _mean([norm for norm in norms if isfinite(norm)])

    @property
    def path_ratio(self) -> float | None:
        """Path length / displacement; 1 for a straight line, None if the displacement is 0."""
        return self.path_length / self.displacement if self.displacement else None

    @property
    def stable_rank(self) -> float:
        """The mean over the modules of the last checkpoint."""
        return _mean([module.stable_rank for module in self.modules])

    @property
    def effective_rank(self) -> float:
        """The mean over the modules of the last checkpoint."""
        return _mean([module.effective_rank for module in self.modules])


@dataclass(frozen=True)
class Comparison:
    """A comparison of series whose ΔW have the same modules and sizes; the ranks may differ."""

    series: list[str]
    """The names of the series."""
    cosine_last: list[list[float]]
    """``[series, series]``, between the ΔW of their last checkpoints"""
    cosine_mean: list[list[float]]
    """``[series, series]``, between the means of ΔW over the sample of each"""
    checkpoints: list[list[str]]
    """The sample of each series."""
    pca: PrincipalComponents | None
    """The PCA of all samples together, one series after the other."""


@dataclass
class Analysis:
    """All series of one command."""

    series: list[SeriesReport]
    comparisons: list[Comparison] = field(default_factory=list)
    """One for each group of two or more series that can be compared."""
    not_compared: list[str] = field(default_factory=list)
    """`series: reason` for each that is in no comparison."""
    duplicates: list[Duplicates] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data, with the derived numbers (means, ratios) of each series."""

        def with_json_keys(items: list[tuple[str, Any]]) -> dict[str, Any]:
            return {JSON_KEYS.get(key, key): value for key, value in items}

        document = asdict(self, dict_factory=with_json_keys)
        for plain, report in zip(document["collections"], self.series, strict=True):
            plain |= {
                "norm_delta": report.norm_delta,
                "mean_norm": report.mean_norm,
                "detour": report.path_ratio,
                "stable_rank": report.stable_rank,
                "effective_rank": report.effective_rank,
            }
        return document


def by_tensor(found: Sequence[str]) -> list[str]:
    """Returns the `file: tensor` lines, with those of one tensor in several files joined to one."""
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


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else nan
