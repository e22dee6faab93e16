"""Kernel ridge regression from features of datasets to their adapters, in closed form. Light.

Features and targets are centred, so that the intercept is free of the penalty (Hastie, Tibshirani
and Friedman 2009, section 3.4.1). A prediction is a combination of the targets whose coefficients
sum to 1; finding them and their leave-one-out error needs inner products alone, not the targets.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PENALTIES = (*(10.0 ** (k / 2) for k in range(-6, 7)), float("inf"))
"""The penalties tried, in units of the features' mean squared distance from their mean; with an
infinite one every prediction is the mean of the targets."""


@dataclass(frozen=True)
class KernelRidge:
    """A regression with a linear kernel, fitted to ``[datasets, dim]`` features."""

    features: np.ndarray
    """``[datasets, dim]``"""
    penalty: float
    """λ, added to the diagonal of the centred kernel."""

    def coefficients(self, feature: np.ndarray) -> np.ndarray:
        """Returns ``[datasets]``: the coefficients of the targets in the prediction for a feature
        ``[dim]``. They sum to 1."""
        count = len(self.features)
        mean = self.features.mean(0, dtype=np.float64)
        centred = self.features - mean  # (N, F)
        if np.isinf(self.penalty):
            return np.full(count, 1 / count)
        matrix = centred @ centred.T + self.penalty * np.eye(count)
        found: np.ndarray = 1 / count + np.linalg.solve(matrix, centred @ (feature - mean))
        return found


def leave_one_out_errors(
    features: np.ndarray, gram: np.ndarray, penalties: Sequence[float]
) -> np.ndarray:
    """Returns, for each λ, the mean squared distance of the targets from their predictions by a
    regression that is fitted, and centred, without them, ``[penalties]``.

    `features` are ``[datasets, dim]``, two at least; `gram` the inner products of the targets,
    ``[datasets, datasets]``. By the hat matrix H of the regression on all, a left-out residual is
    the usual one over 1 - H_ii (Allen 1974), which no refit is needed for.
    """
    count = len(features)
    centred = features - features.mean(0, dtype=np.float64)
    kernel = centred @ centred.T
    errors = []
    for penalty in penalties:
        hat = np.full((count, count), 1 / count)
        if not np.isinf(penalty):
            hat += np.linalg.solve(kernel + penalty * np.eye(count), kernel)
        rest = np.eye(count) - hat
        squares = np.einsum("ij,jk,ik->i", rest, gram, rest) / np.diag(rest) ** 2
        errors.append(squares.clip(min=0).mean())
    return np.array(errors)


def fit_ridge(features: np.ndarray, gram: np.ndarray) -> KernelRidge:
    """Returns the regression with the penalty of `PENALTIES` whose leave-one-out error is least."""
    features = np.asarray(features, dtype=np.float64)
    unit = float(np.square(features - features.mean(0)).sum(1).mean())
    penalties = [penalty * unit for penalty in PENALTIES if unit > 0] or [float("inf")]
    best = int(leave_one_out_errors(features, np.asarray(gram, np.float64), penalties).argmin())
    return KernelRidge(features, penalties[best])
