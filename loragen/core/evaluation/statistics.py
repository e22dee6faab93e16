"""How sure a mean is: 95 % intervals over draws of prompts, tested rows and datasets.

Is what was generated new? Its distance from every training checkpoint, and from their mean.

A generator that only remembers would write one of the checkpoints it has seen; one that ignores
its prompts, their mean. Both distances are between ΔW = s · B A, over all modules, and are told
beside the spread inside a dataset: how far checkpoints of one training run are from their own mean.
Checkpoints are read one at a time, twice; memory does not grow with their number.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot, inf, sqrt
from pathlib import Path
from statistics import fmean, variance
from typing import Any, NamedTuple

import torch
from scipy.stats import norm
from scipy.stats import t as student
from torch import Tensor

from loragen.core.adapter.algebra import Factors, distance, inner, inner_products
from loragen.core.adapter.files import Adapter
from loragen.core.analysis.checkpoints import Checkpoint, read_checkpoint
from loragen.core.evaluation.contestants import Bench
from loragen.core.evaluation.targets import Target

CONFIDENCE = 0.95
Z = float(norm.ppf((1 + CONFIDENCE) / 2))


class Interval(NamedTuple):
    mean: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Of the width, before it is cut off at 0 and 1."""
        return max(self.high - self.mean, self.mean - self.low)


def interval(scores: Sequence[Sequence[float]], rows: Sequence[int]) -> Interval:
    """The 95 % interval of the mean over datasets of the mean over draws, `scores[dataset][draw]`,
    as shares from 0 to 1 of `rows[dataset]` tested rows.

    The wider of two:

    - the datasets are given, their prompts and rows are drawn again. Prompts: a t-interval (Student
      1908) of the variances within datasets, pooled, with sum(draws - 1) degrees of freedom. Rows:
      the binomial error, of shares with one hit and one miss added (Agresti and Coull 1998), so
      that a share of 1 is not taken for certain. The two half widths are added in squares;
    - over datasets, where there are several: the t-interval of the variance between their means,
      with datasets - 1 degrees of freedom. A dataset's mean carries the noise of its own draws and
      rows, so this covers all of chance; it can only be narrower than the first by luck.

    Without a second draw or dataset nothing is known: the interval is [0, 1].
    """
    means = [fmean(draws) for draws in scores]
    drawn = _half(
        sqrt(sum(_variance(draws) / len(draws) for draws in scores)) / len(scores),
        sum(len(draws) - 1 for draws in scores),
    )
    tested = Z * sqrt(sum(map(_binomial, means, rows))) / len(scores)
    halves = [
        None if drawn is None else hypot(drawn, tested),
        _half(sqrt(_variance(means) / len(means)), len(means) - 1),
    ]
    mean, half = fmean(means), max((h for h in halves if h is not None), default=1.0)
    return Interval(mean, max(0.0, mean - half), min(1.0, mean + half))


def _half(error: float, freedom: int) -> float | None:
    return error * float(student.ppf((1 + CONFIDENCE) / 2, freedom)) if freedom else None


def _binomial(share: float, rows: int) -> float:
    """The variance of a share of `rows`."""
    likely = (share * rows + 1) / (rows + 2)
    return likely * (1 - likely) / (rows + 2)


def _variance(values: Sequence[float]) -> float:
    return variance(values) if len(values) > 1 else 0.0


Deltas = dict[str, Factors]
"""Module -> (A, s·B)"""


@dataclass(frozen=True)
class Novelty:
    """Of the adapter generated from a dataset's first draw of prompts; distances of ΔW."""

    target: Target
    to_nearest: float
    nearest: str
    """`dataset/checkpoint` of the nearest training checkpoint."""
    to_mean: float
    """To the mean adapter, of all training checkpoints."""


@dataclass(frozen=True)
class Spread:
    novelties: list[Novelty]
    within: float
    """Mean distance of a training checkpoint to the (element-wise) mean of its dataset."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data: the mean over each group."""
        groups: dict[str, dict[str, float]] = {}
        for group in dict.fromkeys(one.target.group for one in self.novelties):
            members = [one for one in self.novelties if one.target.group == group]
            groups[group] = {
                "to_nearest": fmean(one.to_nearest for one in members),
                "to_mean": fmean(one.to_mean for one in members),
            }
        return {"within_a_dataset": self.within, "groups": groups}


def novelty(bench: Bench, targets: Sequence[Target]) -> Spread:
    """How far the generated adapters are from everything seen in training."""
    gallery = Gallery([bench.generator.generate(bench.draws(target)[0]) for target in targets])
    nearest: list[tuple[float, str]] = [(inf, "")] * len(targets)
    within = []
    for source in bench.sources:
        mean, apart = _mean(source.checkpoints), []
        for file in source.checkpoints:
            deltas = read_checkpoint(file).deltas()
            apart.append(_distance(deltas, mean))
            found = [(far, f"{source.name}/{file.stem}") for far in gallery.distances(deltas)]
            nearest = list(map(min, nearest, found))
        within.append(fmean(apart))
    to_mean = gallery.distances(_deltas(bench.mean_adapter()))
    return Spread(
        [
            Novelty(target, near, label, far)
            for target, (near, label), far in zip(targets, nearest, to_mean, strict=True)
        ],
        fmean(within),
    )


class Gallery:
    """Adapters of one shape, whose distances to another are computed in one go."""

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self.adapters = [_deltas(adapter) for adapter in adapters]
        squares = [_square(deltas) for deltas in self.adapters]
        self.squares = torch.tensor(squares, dtype=torch.float64)

    def distances(self, deltas: Deltas) -> list[float]:
        """‖ΔW - ΔW′‖ of each adapter, by ‖ΔW‖² + ‖ΔW′‖² - 2 ⟨ΔW, ΔW′⟩ in float64."""
        products = torch.zeros(len(self.adapters), dtype=torch.float64)
        for module, factors in deltas.items():
            ours = [adapter[module] for adapter in self.adapters]
            products += inner_products(ours, [factors]).squeeze(1)
        squares: Tensor = self.squares + _square(deltas) - 2 * products
        return list(squares.clamp(min=0).sqrt().tolist())


def _deltas(adapter: Adapter) -> Deltas:
    return Checkpoint(adapter.tensors, adapter.config).deltas()


def _mean(checkpoints: Sequence[Path]) -> Deltas:
    """Of the factors, element by element, in float64."""
    total: Deltas = {}
    for file in checkpoints:
        for module, (a, b) in read_checkpoint(file).deltas().items():
            a, b = a.double() / len(checkpoints), b / len(checkpoints)
            before = total.get(module)
            total[module] = (before[0] + a, before[1] + b) if before else (a, b)
    return total


def _distance(one: Deltas, other: Deltas) -> float:
    return sqrt(sum(distance(factors, other[module]) ** 2 for module, factors in one.items()))


def _square(deltas: Deltas) -> float:
    return sum(inner(factors, factors) for factors in deltas.values())
