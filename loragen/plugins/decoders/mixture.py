"""Mixture: an adapter is an affine combination of the collected ones; prompts choose the shares."""

import math
from collections.abc import Iterable
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from loragen.core.protocols import CollectedAdapters, SupportSet, TokenGrid
from loragen.plugins.decoders.combination import Combination
from loragen.plugins.decoders.reading import ConditionReader, centred, without_autocast

INITIAL_PENALTY = 0.3
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
        share: Literal["adapter", "layer", "kind", "cell"] = Field(
            "adapter",
            description="What shares coefficients: the whole adapter, a layer, a kind of matrix "
            "(q_proj's lora_A), or a matrix of a layer (cell); each has its own penalty.",
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
        self.ridge = Ridge(int(group.max()) + 1)
        self.combine = Combination(group)
        self.register_buffer("readings", torch.zeros(0, config.hidden_dim))

    def use_adapters(self, adapters: CollectedAdapters) -> None:
        self.combine.adapters = adapters
        self.readings = self.readings.new_zeros(adapters.shape[0], self.config.hidden_dim)

    def forward(self, condition: Tensor, mask: Tensor) -> Tensor:
        """Returns ``[batch, tokens, token_dim]``: before `fit`, the mean of the adapters."""
        return self.combine(self._coefficients(condition, mask), range(len(self.readings)))

    def predict(self, condition: Tensor, mask: Tensor, support: SupportSet) -> Tensor:
        known = self.read(support.condition, support.mask)  # (M, F)
        coefficients = self.ridge(self.read(condition, mask), known, support.left_out)
        return self.combine(coefficients, support.datasets.tolist())

    @torch.no_grad()
    def fit(self, support_conditions: Iterable[tuple[Tensor, Tensor]]) -> None:
        self.readings.copy_(torch.cat([self.read(*one) for one in support_conditions]))

    def coefficients(self, condition: Tensor, mask: Tensor) -> Tensor:
        return self._coefficients(condition, mask).mean(1)

    def _coefficients(self, condition: Tensor, mask: Tensor) -> Tensor:
        none = self.readings.new_zeros(len(condition), len(self.readings), dtype=torch.bool)
        found: Tensor = self.ridge(self.read(condition, mask), self.readings, none)
        return found

    def choices(self) -> list[str]:
        groups, adapters = len(self.ridge.log_penalty), len(self.readings)
        each = "" if groups == 1 else f" for each of {groups} groups (share: {self.config.share})"
        return [
            f"{adapters} coefficients{each}, one for each dataset",
            "the adapters stay on disk, in a file beside the generator's",
        ]


class Ridge(nn.Module):
    """Kernel ridge regression with a free intercept, as coefficients of the targets.

    Each of the G groups has a penalty λ of its own, whose logarithm is learned. With the linear
    kernel of the centred readings ``K = Z Zᵀ / F`` and ``k = Z z / F`` the coefficients are ::

        ω = 1 / M + (K + λ I)⁻¹ k

    which is the textbook prediction ``ȳ + (Y - ȳ)ᵀ (K + λ I)⁻¹ k`` for any targets Y, written as
    shares of them: the second term sums to 0, since the rows of K and k do. (Hastie, Tibshirani and
    Friedman, The Elements of Statistical Learning, sections 3.4.1 and 12.3.7.)
    """

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.log_penalty = nn.Parameter(torch.full((groups,), math.log(INITIAL_PENALTY)))

    def forward(self, query: Tensor, known: Tensor, left_out: Tensor) -> Tensor:
        """Maps ``query [B, F]``, ``known [M, F]`` and ``left_out [B, M]`` to ``[B, G, M]``.

        Query b has the coefficient 0 for what it leaves out, which does not influence the others.
        They are computed in float32 at least.
        """
        with without_autocast(query.device):
            query, known, kept = centred(query, known, left_out)
            penalty = self.log_penalty.to(query.dtype).exp()  # (G,)
            kernel = known @ known.transpose(1, 2) / query.shape[-1]  # (B, M, M)
            right = (known @ query[..., None] / query.shape[-1])[:, None]  # (B, 1, M, 1)
            one = torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
            matrix = kernel[:, None] + penalty[:, None, None] * one
            right = right.expand(-1, len(penalty), -1, -1)
            if kernel.device.type == "mps":  # wrong gradients up to torch 2.12 (pytorch#175192)
                solved = torch.linalg.solve(matrix.cpu(), right.cpu()).to(kernel.device)
            else:
                solved = torch.linalg.solve(matrix, right)  # (B, G, M, 1)
            shares = kept / kept.sum(1, keepdim=True)
            return shares[:, None] + solved[..., 0] * kept[:, None]
