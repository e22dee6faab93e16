"""What the checkpoints of a collection are: norms, spectra, drift, damage.

A stream: the first checkpoint, the one before and the one at hand are held, whatever the number of
files. What compares checkpoints each with each works on a bounded sample (`gram.py`).

Collections of checkpoints, each on its own and side by side.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from loragen.core.adapter.layout import NO_LAYER, TensorSpec
from loragen.core.analysis.checkpoints import (
    Checkpoint,
    CheckpointSeries,
    find_series,
    read_checkpoint,
)
from loragen.core.analysis.gram import cosine, evenly, gram, sampled, trajectory
from loragen.core.analysis.report import Analysis, Comparison, Drift, ModuleReport, Report, Twins
from loragen.core.errors import DataError

Label = TypeVar("Label", int, str)
Sizes = dict[str, tuple[int, int]]
"""Module -> (in, out): whose ΔW can be compared."""

DEAD = 1e-3
"""A module (layer) is dead below this share of the root mean square ‖ΔW‖ of all modules (layers).

The root mean square, since neither one that explodes nor a majority that is dead moves it far:
among 200 modules it is at least a fourteenth of the largest, so that at 1e-3 a living module is not
called dead beside one 70 times its size."""


Tell = Callable[[str, int, int], None]
"""Told of progress: the collection's name, files done, files in all."""


def silent(name: str, done: int, total: int) -> None:
    """For callers who want no progress."""


@dataclass(frozen=True)
class Studied:
    """A report, and what comparing it with others needs."""

    report: Report
    finite: list[Path]
    sizes: Sizes


def study(collection: CheckpointSeries, seen: dict[str, list[str]], tell: Tell) -> Studied:
    """`seen` collects the files under the hash of their tensors, for duplicates.

    Raises DataError where a file does not load or the checkpoints differ in modules or shapes.
    """
    last = read_checkpoint(collection.files[-1])
    report = Report(
        name=collection.name,
        path=str(collection.path),
        checkpoints=len(collection.files),
        bytes=sum(_size(file) for file in collection.files),
        tensors=len(last.tensors),
        values=sum(t.numel() for t in last.tensors.values()),
        dtypes=sorted({str(t.dtype).removeprefix("torch.") for t in last.tensors.values()}),
        scaling=last.scaling("") if last.config else None,
        modules=module_reports(last),
    )
    report.dead_layers, report.dead_modules = dead(report.modules)
    finite = _walk(report, collection, seen, tell)
    report.path_length = sum(drift.from_previous for drift in report.drift)
    report.displacement = report.drift[-1].from_first
    report.sample = sampled(finite)
    sizes = {name: (a.shape[1], b.shape[0]) for name, (a, b) in modules(last.tensors)}
    return Studied(report, finite, sizes)


def module_reports(checkpoint: Checkpoint) -> list[ModuleReport]:
    return [_module(name, *f, checkpoint.scaling(name)) for name, f in modules(checkpoint.tensors)]


def _module(name: str, a: Tensor, b: Tensor, scaling: float) -> ModuleReport:
    place = TensorSpec(f"{name}.lora_A.weight", tuple(a.shape), a.dtype)
    values = scaling * singular_values((a, b))
    return ModuleReport(
        module=name,
        layer=place.layer,
        kind=place.module,
        rank=a.shape[0],
        norm_a=float(a.double().norm()),
        norm_b=float(b.double().norm()),
        norm_delta=float(values.norm()),
        sigma_1=float(values.max()),
        stable_rank=stable_rank(values),
        effective_rank=effective_rank(values),
    )


def dead(reports: Sequence[ModuleReport]) -> tuple[list[int], list[str]]:
    """(layers, modules) whose ΔW is (nearly) zero beside the others': below `DEAD` of the root mean
    square; all of them where every ΔW is zero."""
    norms = {report.module: report.norm_delta for report in reports}
    layers: dict[int, float] = {}
    for report in reports:
        if report.layer != NO_LAYER:
            layers[report.layer] = hypot(layers.get(report.layer, 0.0), report.norm_delta)
    return _below(layers), _below(norms)


def damage(tensors: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """(tensors with NaN or infinity, tensors that are zero throughout)."""
    not_finite = [key for key, t in tensors.items() if not torch.isfinite(t).all()]
    zero = [key for key, t in tensors.items() if not t.any()]
    return not_finite, zero


def digest(tensors: Mapping[str, Tensor]) -> str:
    """The hash of what the tensors are, whatever file they are in."""
    found = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].contiguous()
        found.update(f"{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _walk(
    report: Report, collection: CheckpointSeries, seen: dict[str, list[str]], tell: Tell
) -> list[Path]:
    """Along the checkpoints in the order of their steps; gives those that are finite."""
    first = previous = None
    finite = []
    for done, file in enumerate(collection.files, start=1):
        checkpoint = read_checkpoint(file)
        not_finite, zero = damage(checkpoint.tensors)
        report.not_finite += [f"{file.name}: {key}" for key in not_finite]
        report.zero += [f"{file.name}: {key}" for key in zero]
        finite += [] if not_finite else [file]
        seen.setdefault(digest(checkpoint.tensors), []).append(str(file))
        deltas = checkpoint.deltas()
        first, previous = first or deltas, previous or deltas
        report.drift.append(
            Drift(
                checkpoint=file.name,
                norm_delta=hypot(*(norm(factors) for factors in deltas.values())),
                from_first=_apart(file, deltas, first),
                from_previous=_apart(file, deltas, previous),
            )
        )
        previous = deltas
        tell(collection.name, done, len(collection.files))
    return finite


def _apart(file: Path, one: Mapping[str, Factors], other: Mapping[str, Factors]) -> float:
    if _shapes(one) != _shapes(other):
        raise DataError(
            f"{file}: other modules or shapes than the first checkpoint; "
            "give different adapters one by one to compare them"
        )
    return hypot(*(distance(factors, other[name]) for name, factors in one.items()))


def _shapes(factors: Mapping[str, Factors]) -> dict[str, tuple[torch.Size, torch.Size]]:
    return {name: (a.shape, b.shape) for name, (a, b) in factors.items()}


def _below(norms: Mapping[Label, float]) -> list[Label]:
    finite = [norm for norm in norms.values() if isfinite(norm)]
    threshold = DEAD * hypot(*finite) / sqrt(max(len(finite), 1))
    return [label for label, norm in norms.items() if norm <= threshold]


def _size(file: Path) -> int:
    files = file.iterdir() if file.is_dir() else [file]
    return sum(one.stat().st_size for one in files)


MOST_TOGETHER = 60
"""Checkpoints of all collections in a comparison; each gives an even share, at least its last."""


def analyze(paths: Sequence[Path], tell: Tell = silent) -> Analysis:
    """Runs, folders of runs, PEFT directories, folders of them, and single files.

    Raises UsageError for a path with nothing there, DataError for a file that does not load or a
    collection whose checkpoints differ in modules or shapes.
    """
    seen: dict[str, list[str]] = {}
    studied = [study(collection, seen, tell) for collection in find_series(paths)]
    twins = [Twins(files) for files in seen.values() if len(files) > 1]
    analysis = Analysis([one.report for one in studied], twins=twins)
    if len(studied) > 1:
        _compare(analysis, studied)
    return analysis


def _compare(analysis: Analysis, studied: Sequence[Studied]) -> None:
    """Groups of collections with the same modules and sizes; says why one is in none."""
    groups: dict[tuple[object, ...], list[Studied]] = {}
    for one in studied:
        if one.finite:
            groups.setdefault(tuple(one.sizes.items()), []).append(one)
        else:
            analysis.not_compared.append(f"{one.report.name}: no checkpoint is finite")
    for group in groups.values():
        if len(group) > 1:
            analysis.comparisons.append(compare(group))
        else:
            name = group[0].report.name
            analysis.not_compared.append(f"{name}: other modules or sizes than the others")


def compare(group: Sequence[Studied]) -> Comparison:
    """Collections of the same modules and sizes, through one matrix of inner products."""
    samples = [evenly(one.finite, max(1, MOST_TOGETHER // len(group))) for one in group]
    products = gram([file for sample in samples for file in sample])
    sizes = torch.tensor([len(sample) for sample in samples])
    last = sizes.cumsum(0) - 1
    # Row k of `mean` takes the mean over collection k: ⟨mean ΔW, mean ΔW'⟩ = mean of all ⟨ΔW, ΔW'⟩.
    owners = torch.arange(len(group)).repeat_interleave(sizes)
    mean = (owners == torch.arange(len(group))[:, None]).double() / sizes[:, None]
    means = mean @ products @ mean.T
    return Comparison(
        collections=[one.report.name for one in group],
        cosine_last=cosine(products[last][:, last]).tolist(),
        cosine_mean=cosine(means).tolist(),
        checkpoints=[[file.name for file in sample] for sample in samples],
        pca=trajectory(products),
    )
