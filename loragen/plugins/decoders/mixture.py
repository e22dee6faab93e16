"""Mixture: an adapter is an affine combination of the collected ones; prompts choose the shares."""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from loragen.core.protocols import CollectedAdapters, TokenGrid
from loragen.plugins.decoders.reading import ConditionReader

CHUNK = 2**24  # values of all adapters at a time: 64 MiB in float32
INITIAL = {"ridge": 0.3, "softmax": 0.1}  # of the penalty, of the temperature
SHARED = {  # the axes of a token grid on which tokens must agree to have the same coefficients
    "adapter": (),
    "layer": ("layer",),
    "kind": ("module", "matrix"),
    "cell": ("layer", "module", "matrix"),
}


class Mixture(nn.Module):
    """An affine combination of the collected adapters, with coefficients regressed from prompts.

    The adapters themselves are combined, one of each of the N training datasets, whatever their
    number. The coefficients sum to 1. LoRA's A and B are combined element by element: the product
    of two combinations has terms B_i A_j too, unless all adapters share A. ::

        read           [B, prompts, positions, dim] -> each prompt on its own, averaged -> [B, F]
        coefficients   [B, G, N]   from the readings of the prompts and of the N datasets
        mix            [B, tokens, token_dim]   sum over the adapters, which stay on disk

    `fit` stores the readings ``[N, F]`` of the datasets. Reading and coefficients are trained by
    predicting adapters from the *other* datasets (`predict`, the objective `transfer`).
    """

    class Config(BaseModel, extra="forbid"):
        hidden_dim: int = Field(768, ge=1, description="Features F that are read from a prompt.")
        coefficients: Literal["ridge", "softmax"] = Field(
            "ridge",
            description="ridge: kernel ridge regression with a free intercept and a learned "
            "penalty; softmax: of the cosine similarity over a learned temperature.",
        )
        share: Literal["adapter", "layer", "kind", "cell"] = Field(
            "adapter",
            description="What shares coefficients: the whole adapter, a layer, a kind of matrix "
            "(q_proj's lora_A), or a matrix of a layer (cell); each has its own penalty or "
            "temperature.",
        )
        dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the condition.")

    readings: Tensor

    def __init__(self, config: Config, condition_dim: int, grid: TokenGrid) -> None:
        super().__init__()
        self.config = config
        self.read = ConditionReader(condition_dim, config.hidden_dim, config.dropout, bias=False)
        axes = [getattr(grid, axis) for axis in SHARED[config.share]]
        group = np.zeros(grid.tokens, np.int64)
        if axes:
            group = np.unique(np.stack(axes), axis=1, return_inverse=True)[1].reshape(-1)
        self.coefficients_of = Coefficients(config.coefficients, int(group.max()) + 1)
        self.mix = Mix(group)
        self.register_buffer("readings", torch.zeros(0, config.hidden_dim))

    def use_adapters(self, adapters: CollectedAdapters) -> None:
        self.mix.adapters = adapters
        self.readings = self.readings.new_zeros(adapters.shape[0], self.config.hidden_dim)

    def forward(self, condition: Tensor, mask: Tensor) -> Tensor:
        """Returns ``[batch, tokens, token_dim]``: before `fit`, the mean of the adapters."""
        return self.mix(self._coefficients(condition, mask), range(len(self.readings)))

    def predict(
        self,
        condition: Tensor,
        mask: Tensor,
        support_conditions: Tensor,
        support_mask: Tensor,
        support: Tensor,
        left_out: Tensor,
    ) -> Tensor:
        known = self.read(support_conditions, support_mask)  # (M, F)
        coefficients = self.coefficients_of(self.read(condition, mask), known, left_out)
        return self.mix(coefficients, support.tolist())

    @torch.no_grad()
    def fit(self, support_conditions: Iterable[tuple[Tensor, Tensor]]) -> None:
        self.readings.copy_(torch.cat([self.read(*one) for one in support_conditions]))

    def coefficients(self, condition: Tensor, mask: Tensor) -> Tensor:
        return self._coefficients(condition, mask).mean(1)

    def _coefficients(self, condition: Tensor, mask: Tensor) -> Tensor:
        none = self.readings.new_zeros(len(condition), len(self.readings), dtype=torch.bool)
        found: Tensor = self.coefficients_of(self.read(condition, mask), self.readings, none)
        return found

    def choices(self) -> list[str]:
        groups, adapters = len(self.coefficients_of.log_scale), len(self.readings)
        each = "" if groups == 1 else f" for each of {groups} groups (share: {self.config.share})"
        return [
            f"{adapters} coefficients{each}, one for each dataset: {self.config.coefficients}",
            "the adapters stay on disk, in a file beside the generator's",
        ]


class Coefficients(nn.Module):
    """Maps readings to coefficients that sum to 1, by one of `METHODS`.

    Each of the G groups has a positive number of its own, the penalty or temperature, whose
    logarithm is learned.
    """

    def __init__(self, method: str, groups: int) -> None:
        super().__init__()
        self.method = METHODS[method]
        self.log_scale = nn.Parameter(torch.full((groups,), math.log(INITIAL[method])))

    def forward(self, query: Tensor, known: Tensor, left_out: Tensor) -> Tensor:
        """Maps ``query [B, F]``, ``known [M, F]`` and ``left_out [B, M]`` to ``[B, G, M]``.

        Query b has the coefficient 0 for what it leaves out, which does not influence the others.
        They are computed in float32 at least.
        """
        with _without_autocast(query.device):
            dtype = torch.promote_types(query.dtype, torch.float32)
            kept = (~left_out).to(dtype)  # (B, M)
            query, known = query.to(dtype), known.to(dtype)
            centre = kept @ known / kept.sum(1, keepdim=True)  # (B, F)
            deviation = (known - centre[:, None]) * kept[..., None]  # (B, M, F)
            return self.method(query - centre, deviation, kept, self.log_scale.to(dtype).exp())


def ridge(query: Tensor, known: Tensor, kept: Tensor, penalty: Tensor) -> Tensor:
    """Returns the coefficients of kernel ridge regression with a free intercept, ``[B, G, M]``.

    With the linear kernel of the centred readings ``K = Z Zᵀ / F`` and ``k = Z z / F``::

        ω = 1 / M + (K + λ I)⁻¹ k

    which is the textbook prediction ``ȳ + (Y - ȳ)ᵀ (K + λ I)⁻¹ k`` for any targets Y, written as
    shares of them: the second term sums to 0, since the rows of K and k do. `query` ``[B, F]`` and
    `known` ``[B, M, F]`` are centred on what is `kept` ``[B, M]``; `penalty` λ is ``[G]``. (Hastie,
    Tibshirani and Friedman, The Elements of Statistical Learning, sections 3.4.1 and 12.3.7.)
    """
    features = query.shape[-1]
    kernel = known @ known.transpose(1, 2) / features  # (B, M, M)
    right = (known @ query[..., None] / features)[:, None]  # (B, 1, M, 1)
    matrix = kernel[:, None] + penalty[:, None, None] * torch.eye(
        kernel.shape[-1], dtype=kernel.dtype, device=kernel.device
    )
    right = right.expand(-1, len(penalty), -1, -1)
    if kernel.device.type == "mps":  # wrong gradients up to torch 2.12 (pytorch#175192)
        solved = torch.linalg.solve(matrix.cpu(), right.cpu()).to(kernel.device)
    else:
        solved = torch.linalg.solve(matrix, right)  # (B, G, M, 1)
    shares = kept / kept.sum(1, keepdim=True)
    return shares[:, None] + solved[..., 0] * kept[:, None]


def softmax(query: Tensor, known: Tensor, kept: Tensor, temperature: Tensor) -> Tensor:
    """Returns the softmax of the cosine similarities of centred readings, ``[B, G, M]``."""
    similarity = nn.functional.cosine_similarity(query[:, None], known, dim=-1)  # (B, M)
    logits = similarity[:, None] / temperature[:, None]
    return logits.masked_fill(kept[:, None] == 0, -torch.inf).softmax(-1)


METHODS = {"ridge": ridge, "softmax": softmax}


class Mix(nn.Module):
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
        with _without_autocast(coefficients.device):
            mixed: Tensor = _Combination.apply(coefficients, self.adapters, datasets, self.runs)
        return mixed


def _without_autocast(device: torch.device) -> torch.autocast:
    known = torch.amp.is_autocast_available(device.type)  # the device "meta" is not
    return torch.autocast(device.type if known else "cpu", enabled=False)


Runs = Sequence[tuple[slice, int]]
"""Consecutive tokens of one group, and that group."""


class _Combination(torch.autograd.Function):
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
        mixed = coefficients.new_empty(len(coefficients), tokens, dim)
        for here, group, values in _pieces(ctx, coefficients):
            mixed[:, here] = (coefficients[:, group] @ values).unflatten(1, (-1, dim))
        return mixed

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
