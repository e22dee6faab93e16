"""The trained part of a generator: a decoder, and the scale of the conditions that it reads."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from loragen.core.errors import UsageError
from loragen.core.generator.collections.embeddings import TEXTS_AT_ONCE
from loragen.core.generator.layout import Layout
from loragen.core.plugins import create
from loragen.core.protocols import Samples, StartsFromSamples, Transfers

SMALLEST_SPREAD = 1e-6


class Network(nn.Module):
    """A decoder that sees conditions of zero mean and unit spread in every dimension, so that none
    of them, and no training rate, depends on the scale of the encoder's embeddings."""

    condition_mean: Tensor
    condition_spread: Tensor

    def __init__(self, decoder: nn.Module, condition_dim: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.register_buffer("condition_mean", torch.zeros(condition_dim))
        self.register_buffer("condition_spread", torch.ones(condition_dim))

    def forward(self, condition: Tensor, mask: Tensor) -> Tensor:
        """``[batch, prompts, positions, dim]`` -> normalised ``[batch, tokens, token_dim]``."""
        tokens: Tensor = self.decoder(self._standard(condition), mask)
        return tokens

    def features(self, condition: Tensor, mask: Tensor) -> Tensor:
        """What a decoder that transfers reads in conditions, ``[batch, F]``."""
        return self.transfers.features(self._standard(condition), mask)

    @property
    def transfers(self) -> Transfers:
        """The decoder, where it can write from other datasets alone."""
        assert isinstance(self.decoder, Transfers)
        return self.decoder

    def _standard(self, condition: Tensor) -> Tensor:
        return (condition - self.condition_mean) / self.condition_spread

    @torch.no_grad()
    def fit_conditions(self, embedded: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
        """Over ``(embeddings [texts, positions, dim], mask [texts, positions])`` of every dataset,
        each dataset weighing the same."""
        means, squares = [], []
        for embeddings, mask in embedded:
            total = np.zeros((2, embeddings.shape[-1]))  # of the values and of their squares
            for first in range(0, len(embeddings), TEXTS_AT_ONCE):
                some = slice(first, first + TEXTS_AT_ONCE)
                valid = np.asarray(embeddings[some], np.float64)[np.asarray(mask[some])]
                total += valid.sum(0), np.square(valid).sum(0)
            mean_of_one, square_of_one = total / np.count_nonzero(mask)
            means.append(mean_of_one)
            squares.append(square_of_one)
        mean = np.mean(means, axis=0)
        spread = np.sqrt(np.maximum(np.mean(squares, axis=0) - np.square(mean), 0))
        self.condition_mean.copy_(torch.from_numpy(mean))
        self.condition_spread.copy_(torch.from_numpy(np.maximum(spread, SMALLEST_SPREAD)))

    def start_from(self, samples: Samples) -> None:
        """Shows the decoder example adapters, normalised, if it cares to see any."""
        if isinstance(self.decoder, StartsFromSamples):
            self.decoder.start_from(samples)


def new_network(
    name: str, options: Mapping[str, Any], condition_dim: int, layout: Layout
) -> Network:
    """A decoder for the layout, before its first step. Raises UsageError where the options do not
    suit the layout (a plugin's ValueError)."""
    try:
        decoder = create("decoder", name, options, condition_dim, layout.grid())
    except ValueError as error:
        raise UsageError(f"decoder {name}: {error}") from None
    return Network(decoder, condition_dim)
