"""Linear combinations of the collected adapters, which stay on disk."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from loragen.core.protocols import CollectedAdapters
from loragen.plugins.decoders.reading import without_autocast

CHUNK = 2**20  # values of all adapters at a time: 4 MiB in float32, half the time of 64 MiB


class Combination(nn.Module):
    """Combines collected adapters, read from disk in pieces.

    Memory holds the result and `CHUNK` values, whatever the number of adapters; the gradient reads
    them a second time.
    """

    adapters: CollectedAdapters

    def __init__(self, group: np.ndarray) -> None:
        """`group` ``[tokens]`` is the group of each token's coefficients."""
        super().__init__()
        edges = [0, *(np.flatnonzero(np.diff(group)) + 1).tolist(), len(group)]
        self.runs = [(slice(first, last), int(group[first])) for first, last in pairwise(edges)]

    def forward(self, coefficients: Tensor, datasets: Sequence[int]) -> Tensor:
        """Maps ``coefficients [B, G, M]`` of M of the datasets to ``[B, tokens, token_dim]``."""
        if not coefficients.requires_grad and coefficients.device.type != "meta":
            used = (coefficients != 0).any(0).any(0).nonzero()[:, 0]
            coefficients = coefficients[..., used]
            datasets = [datasets[index] for index in used.tolist()]
            if not datasets:
                return coefficients.new_zeros(len(coefficients), *self.adapters.shape[1:])
        with without_autocast(coefficients.device):
            combined: Tensor = _Sum.apply(coefficients, self.adapters, datasets, self.runs)
        return combined


Runs = Sequence[tuple[slice, int]]
"""Consecutive tokens of one group, and that group."""


class _Sum(torch.autograd.Function):
    """Sums ``coefficients [B, G, M]`` times adapters, each token with those of its group."""

    @staticmethod
    def forward(
        ctx: Any,
        coefficients: Tensor,
        adapters: CollectedAdapters,
        datasets: Sequence[int],
        runs: Runs,
    ) -> Tensor:
        ctx.read = adapters, datasets, runs
        ctx.coefficients = coefficients.shape, coefficients.dtype
        _, tokens, dim = adapters.shape
        combined = coefficients.new_empty(len(coefficients), tokens, dim)
        for here, group, values in _pieces(ctx, coefficients):
            combined[:, here] = (coefficients[:, group] @ values).unflatten(1, (-1, dim))
        return combined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        shape, dtype = ctx.coefficients
        gradient = slope.new_zeros(shape, dtype=dtype)
        for here, group, values in _pieces(ctx, gradient):
            gradient[:, group] += slope[:, here].to(dtype).flatten(1) @ values.T
        return gradient, None, None, None


def _pieces(ctx: Any, like: Tensor) -> Iterable[tuple[slice, int, Tensor]]:
    """Yields tokens of one group, the group, and ``[M, values]``: those tokens of the adapters."""
    adapters, datasets, runs = ctx.read
    step = max(1, CHUNK // (max(1, len(datasets)) * adapters.shape[2]))
    for run, group in runs:
        for first in range(run.start, run.stop, step):
            here = slice(first, min(first + step, run.stop))
            yield here, group, adapters.read(datasets, here).to(like).flatten(1)
