"""Collections of checkpoints, each on its own and side by side."""

from collections.abc import Sequence
from pathlib import Path

import torch

from loragen.core.analysis.collection import Studied, Tell, silent, study
from loragen.core.analysis.gram import cosine, evenly, gram, trajectory
from loragen.core.analysis.places import find_collections
from loragen.core.analysis.report import Analysis, Comparison, Twins

MOST_TOGETHER = 60
"""Checkpoints of all collections in a comparison; each gives an even share, at least its last."""


def analyze(paths: Sequence[Path], tell: Tell = silent) -> Analysis:
    """Runs, folders of runs, PEFT directories, folders of them, and single files.

    Raises UsageError for a path with nothing there, DataError for a file that does not load or a
    collection whose checkpoints differ in modules or shapes.
    """
    seen: dict[str, list[str]] = {}
    studied = [study(collection, seen, tell) for collection in find_collections(paths)]
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
