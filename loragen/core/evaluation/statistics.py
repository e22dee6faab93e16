"""The 95 % interval of a mean accuracy, and the novelty of generated adapters.

Novelty: a generator that memorises returns a training checkpoint, and one that ignores its prompts
returns their mean. Distances from both are measured between ΔW = s · B A over all modules, and
reported beside the distance of a training run's checkpoints from their own mean. Checkpoints are
read one at a time, twice, so that memory does not grow with their number.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot, inf, sqrt
from statistics import fmean, variance
from typing import Any, NamedTuple

import torch
from scipy.stats import norm
from scipy.stats import t as student
from torch import Tensor

from loragen.core.adapter.algebra import Factors, distance, inner, inner_products
from loragen.core.adapter.files import Adapter
from loragen.core.analysis.checkpoints import Checkpoint, read_checkpoint
from loragen.core.evaluation.contestants import EvaluationSetup, draws_of
from loragen.core.evaluation.targets import Target

CONFIDENCE = 0.95
Z = float(norm.ppf((1 + CONFIDENCE) / 2))


class Interval(NamedTuple):
    low: float
    high: float


def interval(scores: Sequence[Sequence[float]], rows: Sequence[int]) -> Interval:
    """Returns the 95 % interval of the mean over datasets of the mean over draws.

    `scores[dataset][draw]` are shares from 0 to 1 of `rows[dataset]` tested rows. The interval is
    the wider of two:

    - with the datasets fixed and the prompts and rows drawn again. Prompts: a t-interval (Student
      1908) of the variances within datasets, pooled, with sum(draws - 1) degrees of freedom. Rows:
      the binomial error, of shares with one hit and one miss added (Agresti and Coull 1998), so
      that a share of 1 has an error. The half widths add in squares;
    - over datasets, if there are several: the t-interval of the variance between their means,
      with datasets - 1 degrees of freedom. A dataset's mean has the noise of its own draws and
      rows, so this covers every source of chance; only by luck is it narrower than the first.

    A single draw of a single dataset gives no estimate, and the interval is [0, 1].
    """

    def quantile(freedom: int) -> float:
        return float(student.ppf((1 + CONFIDENCE) / 2, freedom))

    means = [fmean(draws) for draws in scores]
    halves: list[float] = []
    if freedom := sum(len(draws) - 1 for draws in scores):
        squares = [variance(draws) / len(draws) for draws in scores if len(draws) > 1]
        drawn = quantile(freedom) * (sqrt(sum(squares)) / len(scores))
        likely = [(mean * n + 1) / (n + 2) for mean, n in zip(means, rows, strict=True)]
        binomial = [p * (1 - p) / (n + 2) for p, n in zip(likely, rows, strict=True)]
        halves.append(hypot(drawn, Z * sqrt(sum(binomial)) / len(scores)))
    if len(means) > 1:
        halves.append(quantile(len(means) - 1) * sqrt(variance(means) / len(means)))
    mean, half = fmean(means), max(halves, default=1.0)
    return Interval(max(0.0, mean - half), min(1.0, mean + half))


Deltas = dict[str, Factors]
"""{module: (A, s·B)}"""


@dataclass(frozen=True)
class Novelty:
    """Distances of ΔW from the adapter generated with a dataset's first draw of prompts."""

    target: Target
    to_nearest: float
    nearest: str
    """`dataset/checkpoint` of the nearest training checkpoint."""
    to_mean: float
    """The distance to the mean adapter of all training checkpoints."""


@dataclass(frozen=True)
class NoveltyReport:
    novelties: list[Novelty]
    within: float
    """The mean distance of a training checkpoint to the element-wise mean of its dataset."""

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data with the mean over each group."""
        groups: dict[str, dict[str, float]] = {}
        for group in dict.fromkeys(one.target.group for one in self.novelties):
            members = [one for one in self.novelties if one.target.group == group]
            groups[group] = {
                "to_nearest": fmean(one.to_nearest for one in members),
                "to_mean": fmean(one.to_mean for one in members),
            }
        return {"within_a_dataset": self.within, "groups": groups}


def novelty(setup: EvaluationSetup, targets: Sequence[Target]) -> NoveltyReport:
    """Measures how far generated adapters are from everything seen in training."""
    generator = setup.generator
    first = [draws_of(target, generator, setup.options)[0] for target in targets]
    generated = DeltaSet([generator.generate(prompts) for prompts in first])
    nearest: list[tuple[float, str]] = [(inf, "")] * len(targets)
    within = []
    for source in setup.sources:
        # The mean is that of the factors, element by element, in float64.
        mean: Deltas = {}
        for file in source.checkpoints:
            for module, (a, b) in read_checkpoint(file, source.adapter_config).deltas().items():
                a, b = a.double() / len(source.checkpoints), b / len(source.checkpoints)
                before = mean.get(module)
                mean[module] = (before[0] + a, before[1] + b) if before else (a, b)
        spread = []
        for file in source.checkpoints:
            deltas = read_checkpoint(file, source.adapter_config).deltas()
            squares = [distance(factors, mean[module]) ** 2 for module, factors in deltas.items()]
            spread.append(sqrt(sum(squares)))
            found = [(far, f"{source.name}/{file.stem}") for far in generated.distances(deltas)]
            nearest = list(map(min, nearest, found))
        within.append(fmean(spread))
    to_mean = generated.distances(_deltas(setup.mean_adapter()))
    novelties = [
        Novelty(target, near, label, far)
        for target, (near, label), far in zip(targets, nearest, to_mean, strict=True)
    ]
    return NoveltyReport(novelties, fmean(within))


class DeltaSet:
    """The ΔW of several adapters of one shape, whose distances to another are computed at once."""

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self.adapters = [_deltas(adapter) for adapter in adapters]
        self.squares = torch.tensor([_square(one) for one in self.adapters], dtype=torch.float64)

    def distances(self, deltas: Deltas) -> list[float]:
        """Returns ‖ΔW - ΔW′‖ of each adapter, by ‖ΔW‖² + ‖ΔW′‖² - 2 ⟨ΔW, ΔW′⟩ in float64."""
        products = torch.zeros(len(self.adapters), dtype=torch.float64)
        for module, factors in deltas.items():
            ours = [adapter[module] for adapter in self.adapters]
            products += inner_products(ours, [factors]).squeeze(1)
        squares: Tensor = self.squares + _square(deltas) - 2 * products
        return list(squares.clamp(min=0).sqrt().tolist())


def _deltas(adapter: Adapter) -> Deltas:
    return Checkpoint(adapter.tensors, adapter.config).deltas()


def _square(deltas: Deltas) -> float:
    """Returns ‖ΔW‖² over all modules."""
    return sum(inner(factors, factors) for factors in deltas.values())
