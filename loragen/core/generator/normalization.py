"""Normalisation of adapter tokens: a step of its own, exact to rounding.

What a collection's adapters share, above all the common LoRA initialisation, is random and cannot
be told from a prompt. So the mean adapter is kept as it is and a decoder learns deviations from
it, scaled to unit RMS per tensor: small matrices then weigh as much as large ones in the loss.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loragen.core.generator.layout import Layout


@dataclass(frozen=True)
class Normalization:
    mean: Tensor
    """``[tokens, token_dim]`` float32: the mean adapter."""
    scale: Tensor
    """``[tokens, 1]`` float32: RMS deviation from the mean of the tensor a token belongs to."""

    @classmethod
    def fit(cls, layout: Layout, collections: Iterable[np.ndarray]) -> "Normalization":
        """Over collections ``[checkpoints, tokens, token_dim]``, each dataset weighing the same,
        in one pass that holds one checkpoint at a time."""
        total = np.zeros((layout.tokens, layout.token_dim))
        squares = np.zeros(layout.tokens)
        datasets = 0
        for collection in collections:
            datasets += 1
            for tokens in collection:
                total += tokens / len(collection)
                squares += np.square(tokens, dtype=np.float64).sum(axis=1) / len(collection)
        mean = total / datasets
        deviation = np.maximum(squares / datasets - np.square(mean).sum(axis=1), 0)
        owners = layout.owners()
        sizes = np.array([spec.size for spec in layout.tensors])
        variance = np.bincount(owners, weights=deviation, minlength=len(sizes)) / sizes
        # A tensor that never moves needs no scale; rounding may leave a trace of variance.
        moves = variance > 1e-12 * np.maximum(
            np.bincount(owners, squares) / sizes / datasets, 1e-30
        )
        scale = np.where(moves, np.sqrt(variance), 1.0)[owners][:, None]
        return cls(torch.from_numpy(mean).float(), torch.from_numpy(scale).float())

    def normalize(self, tokens: Tensor) -> Tensor:
        return (tokens.to(self.mean) - self.mean) / self.scale

    def denormalize(self, normalized: Tensor) -> Tensor:
        return normalized * self.scale + self.mean

    def of(self, tokens: slice) -> "Normalization":
        """The same for some of the tokens."""
        return Normalization(self.mean[tokens], self.scale[tokens])

    def to(self, device: torch.device) -> "Normalization":
        return Normalization(self.mean.to(device), self.scale.to(device))


def importance(
    layout: Layout, normalization: Normalization, collections: Sequence[np.ndarray]
) -> Tensor:
    """``[tokens, 1]`` float32, of mean 1 over the values: how much an error of each token counts.

    ``1 / (1 + v)``, v being the token's variance within a collection over that between collections:
    where the checkpoints of one dataset scatter as widely as datasets do, a weight is mostly noise.
    After the importance that Drag-and-Drop LLMs give by the variance between checkpoints. In one
    pass that holds one checkpoint at a time.
    """
    within, total = np.zeros(layout.tokens), np.zeros(layout.tokens)
    common = normalization.mean.numpy()
    for collection in collections:
        own, squares = np.zeros(common.shape), np.zeros(layout.tokens)
        for tokens in collection:
            deviation = tokens - common
            own += deviation / len(collection)
            squares += np.square(deviation).sum(axis=1) / len(collection)
        total += squares
        within += np.maximum(squares - np.square(own).sum(axis=1), 0)
    between = np.maximum(total - within, 1e-30 + 1e-12 * total)
    weights = 1 / (1 + within / between)
    values = layout.mask().sum(dim=1).numpy()  # of each token, without padding
    return torch.from_numpy(weights / np.average(weights, weights=values)).float()[:, None]
