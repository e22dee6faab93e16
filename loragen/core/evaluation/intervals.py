"""How sure a mean is: 95 % intervals over draws of prompts, tested rows and datasets."""

from collections.abc import Sequence
from math import hypot, sqrt
from statistics import fmean, variance
from typing import NamedTuple

from scipy.stats import norm
from scipy.stats import t as student

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
