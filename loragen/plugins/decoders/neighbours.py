"""Neighbours: a multi-task adapter, moved towards the adapter of the most similar dataset."""

from collections.abc import Iterable

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from loragen.core.protocols import CollectedAdapters, Samples, SupportSet, TokenGrid
from loragen.plugins.decoders.combination import Combination
from loragen.plugins.decoders.reading import centred, mean_over_prompts, without_autocast

RATE_FACTOR = 128.0
"""How much faster the multi-task adapter learns than the learning rate says. Its values have the
size 1 as a generator's do (the standard deviation of the collected adapters), and move by 0.06 in a
step at 5e-4: like a LoRA's B, of size 0.02, at a learning rate of 1e-3."""
CHUNK = 2**20  # values of all adapters at a time: 4 MiB in float32
MIN_SHARE = 1e-3
"""Shares below this part of the largest one are 0, so that few adapters are read."""


class Neighbours(nn.Module):
    """One adapter of all datasets, moved towards those of the most similar ones.

    ::

        reading      [B, dim]       the mean embedding of the prompts
        similarity   [B, N]         its cosine with those of the N datasets, less their mean
        weight       [B] =          pull * the square of the highest similarity, or of 0
        nearest      [B, tokens, token_dim] = softmax(similarity / temperature) @ collected adapters
        adapter      [B, tokens, token_dim] = weight * nearest + (1 - weight) * multi-task adapter

    A combination of the adapters of two tasks often solves neither task, so the temperature is low:
    one close neighbour is taken whole. The multi-task adapter can follow the instruction of a task
    that resembles no other; part of the way to a neighbour's adapter it does so better, also where
    neither alone does. The weight falls with the square of the similarity, because a neighbour that
    resembles the task a little answers something else more often than it helps. The multi-task
    adapter is trained through the base on the rows of all datasets, and starts as their mean.
    Nothing else is trained: the multi-task adapter has seen the task of every training dataset, so
    a weight that is learned beside it would trust it too much.

    The adapters of the most similar tasks are combined by LoraRetriever, too (arXiv 2402.09997).
    """

    class Config(BaseModel, extra="forbid"):
        temperature: float = Field(
            0.05, gt=0, description="Of the softmax; a low one takes the most similar one whole."
        )
        pull: float = Field(
            1.0,
            ge=0,
            le=1,
            description="The weight of the most similar adapters is this times the square of the "
            "similarity; the rest is the multi-task adapter.",
        )

    readings: Tensor
    mean: Tensor
    differs: Tensor

    def __init__(self, config: Config, condition_dim: int, grid: TokenGrid) -> None:
        super().__init__()
        self.config = config
        self.combine = Combination(np.zeros(grid.tokens, np.int64))
        self.change = nn.Parameter(torch.zeros(grid.tokens, grid.token_dim))
        self.register_buffer("readings", torch.zeros(0, condition_dim))
        self.register_buffer("mean", torch.zeros(grid.tokens, grid.token_dim))
        self.register_buffer("differs", torch.ones(grid.tokens, 1, dtype=torch.bool))

    def use_adapters(self, adapters: CollectedAdapters) -> None:
        self.combine.adapters = adapters
        self.readings = self.readings.new_zeros(adapters.shape[0], self.readings.shape[1])

    @torch.no_grad()
    def start_from(self, samples: Samples) -> None:
        """Starts the multi-task adapter as the mean. What is the same in all adapters, as a frozen
        A, stays."""
        count, tokens, dim = samples.shape
        step = max(1, CHUNK // (count * dim))
        for first in range(0, tokens, step):
            here = slice(first, first + step)
            values = samples[here]  # (samples, tokens, token_dim)
            self.mean[here] = values.mean(0)
            self.differs[here] = (values != values[0]).any(0).any(-1, keepdim=True)

    def forward(self, condition: Tensor, mask: Tensor) -> Tensor:
        """Returns ``[batch, tokens, token_dim]``."""
        return self._adapter(self._shares(condition, mask), range(len(self.readings)))

    def predict(self, condition: Tensor, mask: Tensor, support: SupportSet) -> Tensor:
        known = mean_over_prompts(support.condition, support.mask)
        own = mean_over_prompts(condition, mask)
        shares = self._shares_of(own, known, support.left_out)
        return self._adapter(shares, support.datasets.tolist())

    @torch.no_grad()
    def fit(self, support_conditions: Iterable[tuple[Tensor, Tensor]]) -> None:
        self.readings.copy_(torch.cat([mean_over_prompts(*one) for one in support_conditions]))

    def coefficients(self, condition: Tensor, mask: Tensor) -> Tensor:
        return self._shares(condition, mask)[:, :-1]

    def choices(self) -> list[str]:
        count = len(self.readings)
        return [
            "a multi-task adapter is trained on the rows of all datasets",
            f"it is moved towards the most similar of {count} adapters, kept beside the generator",
        ]

    def trained_adapter(self) -> Tensor:
        """Returns the multi-task adapter, ``[tokens, token_dim]``: the mean of the collected ones,
        and its change, which weight decay shrinks."""
        return self.mean + RATE_FACTOR * torch.where(self.differs, self.change, 0.0)

    def _shares(self, condition: Tensor, mask: Tensor) -> Tensor:
        none = self.readings.new_zeros(len(condition), len(self.readings), dtype=torch.bool)
        return self._shares_of(mean_over_prompts(condition, mask), self.readings, none)

    def _shares_of(self, query: Tensor, known: Tensor, left_out: Tensor) -> Tensor:
        """Maps ``query [B, dim]``, ``known [M, dim]``, ``left_out [B, M]`` to ``[B, M + 1]``."""
        with without_autocast(query.device):
            query, known, kept = centred(query, known, left_out)
            similarity = nn.functional.cosine_similarity(query[:, None], known, dim=-1)  # (B, M)
            similarity = similarity.masked_fill(kept == 0, -torch.inf)
            highest = similarity.amax(1, keepdim=True).clamp(0, 1)  # (B, 1)
            weight = self.config.pull * highest.square()
            nearest = (similarity / self.config.temperature).softmax(-1)
            nearest = torch.where(nearest < MIN_SHARE * nearest.amax(1, keepdim=True), 0.0, nearest)
            nearest = nearest / nearest.sum(1, keepdim=True)
            return torch.cat([weight * nearest, 1 - weight], 1)

    def _adapter(self, shares: Tensor, datasets: Iterable[int]) -> Tensor:
        """Maps ``shares [B, M + 1]`` to ``[B, tokens, token_dim]``."""
        collected = self.combine(shares[:, None, :-1], list(datasets))
        return collected + shares[:, -1, None, None] * self.trained_adapter()
