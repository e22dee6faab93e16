"""Analysis of series of checkpoints: norms, spectra, drift and damage, and comparisons.

A series is read as a stream: the first, the previous and the current checkpoint are in memory,
whatever the number of files. Comparisons in pairs use a sample of bounded size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import hypot, isfinite, sqrt
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from loragen.core.adapter.algebra import (
    Factors,
    distance,
    effective_rank,
    modules,
    norm,
    singular_values,
    stable_rank,
)
from loragen.core.adapter.checks import not_finite
from loragen.core.adapter.files import tensors_hash
from loragen.core.adapter.layout import NO_LAYER, TensorSpec
from loragen.core.analysis.checkpoints import (
    Checkpoint,
    CheckpointSeries,
    cosines,
    evenly_spaced,
    find_series,
    inner_product_matrix,
    principal_components,
)
from loragen.core.analysis.report import (
    Analysis,
    ComparedCheckpoints,
    Comparison,
    Drift,
    Duplicates,
    ModuleReport,
    SeriesReport,
)
from loragen.core.errors import DataError

Label = TypeVar("Label", int, str)

DEAD = 1e-3
"""A module (layer) is dead below this share of the root mean square ‖ΔW‖ of all modules (layers).

A few modules that explode, or a majority that is dead, change the root mean square little: among
200 modules it is at least a fourteenth of the largest. A module is not called dead beside one that
is 70 times as large."""
MOST_CHECKPOINTS = 50
"""The number of checkpoints of one series that are compared in pairs: 1,275 inner products."""
MOST_TOGETHER = 60
"""The number of checkpoints in a comparison; each series has an even share, at least its last."""


def analyze_checkpoints(
    paths: Sequence[Path],
    progress: Callable[[str, int, int], None] | None = None,
    most: int | None = None,
) -> Analysis:
    """Analyses runs, folders of runs, PEFT directories, folders of them, and single files.

    `progress` is called with the series' name, the files done and all files. Of more than `most`
    checkpoints of a series, as many are read, evenly spaced. Raises UsageError for
    a path with nothing there, DataError for a file that does not load or a series whose checkpoints
    differ in modules or shapes.
    """
    files_of: dict[str, list[str]] = {}
    found = find_series(paths)
    if most is not None:
        found = [replace(one, files=evenly_spaced(one.files, most)) for one in found]
    analyzed = [_analyze_series(one, files_of, progress) for one in found]
    duplicates = [Duplicates(files) for files in files_of.values() if len(files) > 1]
    analysis = Analysis([one.report for one in analyzed], duplicates=duplicates)
    if len(analyzed) == 1:
        return analysis
    # Series with the same modules and sizes can be compared.
    groups: dict[tuple[object, ...], list[AnalyzedSeries]] = {}
    for one in analyzed:
        if one.finite:
            groups.setdefault(tuple(one.sizes.items()), []).append(one)
        else:
            analysis.not_compared.append(f"{one.report.name}: no checkpoint is finite")
    for group in groups.values():
        if len(group) > 1:
            analysis.comparisons.append(_compare(group))
        else:
            name = group[0].report.name
            analysis.not_compared.append(f"{name}: other modules or sizes than the others")
    return analysis


@dataclass(frozen=True)
class AnalyzedSeries:
    """A series with its report and the data for comparisons with others."""

    report: SeriesReport
    series: CheckpointSeries
    finite: list[Path]
    """The checkpoints without NaN and infinity."""
    sizes: dict[str, tuple[int, int]]
    """{module: (in, out)}"""


def _analyze_series(
    series: CheckpointSeries,
    files_of: dict[str, list[str]],
    progress: Callable[[str, int, int], None] | None,
) -> AnalyzedSeries:
    """Reads all checkpoints in the order of their steps, and adds the files to `files_of`, by the
    hash of their tensors."""
    last = series.read(series.files[-1])
    report = SeriesReport(
        name=series.name,
        path=str(series.path),
        checkpoints=len(series.files),
        bytes=sum(
            one.stat().st_size
            for file in series.files
            for one in (file.iterdir() if file.is_dir() else [file])
        ),
        tensors=len(last.tensors),
        values=sum(t.numel() for t in last.tensors.values()),
        dtypes=sorted({str(t.dtype).removeprefix("torch.") for t in last.tensors.values()}),
        scaling=last.scaling("") if last.config else None,
        modules=module_reports(last),
    )
    report.dead_layers, report.dead_modules = dead(report.modules)
    first = previous = None
    finite = []
    for done, file in enumerate(series.files, start=1):
        checkpoint = series.read(file)
        broken, zero = damage(checkpoint.tensors)
        report.not_finite += [f"{file.name}: {key}" for key in broken]
        report.zero += [f"{file.name}: {key}" for key in zero]
        finite += [] if broken else [file]
        files_of.setdefault(tensors_hash(checkpoint.tensors), []).append(str(file))
        deltas = checkpoint.deltas()
        first, previous = first or deltas, previous or deltas
        report.drift.append(
            Drift(
                checkpoint=file.name,
                norm_delta=hypot(*(norm(factors) for factors in deltas.values())),
                from_first=_distance(file, deltas, first),
                from_previous=_distance(file, deltas, previous),
            )
        )
        previous = deltas
        if progress:
            progress(series.name, done, len(series.files))
    report.path_length = sum(drift.from_previous for drift in report.drift)
    report.displacement = report.drift[-1].from_first
    sample = evenly_spaced(finite, MOST_CHECKPOINTS)
    if len(sample) > 1:
        products = inner_product_matrix([(series, file) for file in sample])
        names, pca = [file.name for file in sample], principal_components(products)
        report.sample = ComparedCheckpoints(names, cosines(products).tolist(), pca)
    sizes = {name: (a.shape[1], b.shape[0]) for name, (a, b) in modules(last.tensors)}
    return AnalyzedSeries(report, series, finite, sizes)


def module_reports(checkpoint: Checkpoint) -> list[ModuleReport]:
    """Returns the norms, spectrum and ranks of every module, layer by layer."""
    reports = []
    for name, (a, b) in modules(checkpoint.tensors):
        spec = TensorSpec(f"{name}.lora_A.weight", tuple(a.shape), a.dtype)
        values = checkpoint.scaling(name) * singular_values((a, b))
        reports.append(
            ModuleReport(
                module=name,
                layer=spec.layer,
                kind=spec.module,
                rank=a.shape[0],
                scaling=checkpoint.scaling(name) if checkpoint.config else None,
                norm_a=float(a.double().norm()),
                norm_b=float(b.double().norm()),
                norm_delta=float(values.norm()),
                sigma_1=float(values.max()),
                stable_rank=stable_rank(values),
                effective_rank=effective_rank(values),
            )
        )
    return reports


def dead(reports: Sequence[ModuleReport]) -> tuple[list[int], list[str]]:
    """Returns the (layers, modules) whose ΔW is zero, or almost, beside the others (see `DEAD`)."""
    norms = {report.module: report.norm_delta for report in reports}
    layers: dict[int, float] = {}
    for report in reports:
        if report.layer != NO_LAYER:
            layers[report.layer] = hypot(layers.get(report.layer, 0.0), report.norm_delta)
    return _below(layers), _below(norms)


def _below(norms: Mapping[Label, float]) -> list[Label]:
    finite = [norm for norm in norms.values() if isfinite(norm)]
    threshold = DEAD * hypot(*finite) / sqrt(max(len(finite), 1))
    return [label for label, norm in norms.items() if norm <= threshold]


def damage(tensors: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """Returns (tensors with NaN or infinity, tensors that are all zero)."""
    return not_finite(tensors), [key for key, t in tensors.items() if not t.any()]


def _distance(file: Path, one: Mapping[str, Factors], other: Mapping[str, Factors]) -> float:
    shapes = [{name: (a.shape, b.shape) for name, (a, b) in of.items()} for of in (one, other)]
    if shapes[0] != shapes[1]:
        raise DataError(
            f"{file}: other modules or shapes than the first checkpoint; "
            "give different adapters one by one to compare them"
        )
    return hypot(*(distance(factors, other[name]) for name, factors in one.items()))


def _compare(group: Sequence[AnalyzedSeries]) -> Comparison:
    """Compares series of the same modules and sizes through one matrix of inner products."""
    share = max(1, MOST_TOGETHER // len(group))
    samples = [evenly_spaced(one.finite, share) for one in group]
    files = [(one.series, f) for one, of in zip(group, samples, strict=True) for f in of]
    products = inner_product_matrix(files)
    sizes = torch.tensor([len(sample) for sample in samples])
    last = sizes.cumsum(0) - 1
    # Row k of `mean` averages over series k: ⟨mean ΔW, mean ΔW'⟩ is the mean of all ⟨ΔW, ΔW'⟩.
    owners = torch.arange(len(group)).repeat_interleave(sizes)
    mean = (owners == torch.arange(len(group))[:, None]).double() / sizes[:, None]
    means = mean @ products @ mean.T
    return Comparison(
        series=[one.report.name for one in group],
        cosine_last=cosines(products[last][:, last]).tolist(),
        cosine_mean=cosines(means).tolist(),
        checkpoints=[[file.name for file in sample] for sample in samples],
        pca=principal_components(products),
    )
