"""How sure a mean is: 95 % intervals over draws of prompts and over datasets."""

from collections.abc import Sequence
from math import sqrt
from statistics import fmean, variance
from typing import NamedTuple

from scipy.stats import t as student

CONFIDENCE = 0.95


class Interval(NamedTuple):
    mean: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Of the width, before it is cut off at 0 and 1."""
        return max(self.high - self.mean, self.mean - self.low)


def interval(scores: Sequence[Sequence[float]]) -> Interval:
    """The 95 % interval of the mean over datasets of the mean over draws, `scores[dataset][draw]`,
    as shares from 0 to 1.

    The wider of two t-intervals (Student 1908):

    - over draws: the datasets are given, only their prompts are drawn again; the variances within
      datasets, pooled, with sum(draws - 1) degrees of freedom;
    - over datasets, where there are several: the variance between the datasets' means, with
      datasets - 1 degrees of freedom. A dataset's mean carries the noise of its own draws, so this
      covers both sources of chance; it can only be narrower than the first by luck.

    Without a second draw or dataset nothing is known: the interval is [0, 1].
    """
    means = [fmean(draws) for draws in scores]
    halves = [
        _half(
            sqrt(sum(_variance(draws) / len(draws) for draws in scores)) / len(scores),
            sum(len(draws) - 1 for draws in scores),
        ),
        _half(sqrt(_variance(means) / len(means)), len(means) - 1),
    ]
    mean, half = fmean(means), max((h for h in halves if h is not None), default=1.0)
    return Interval(mean, max(0.0, mean - half), min(1.0, mean + half))


def _half(error: float, freedom: int) -> float | None:
    return error * float(student.ppf((1 + CONFIDENCE) / 2, freedom)) if freedom else None


def _variance(values: Sequence[float]) -> float:
    return variance(values) if len(values) > 1 else 0.0
