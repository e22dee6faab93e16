"""Example adapters for a decoder to start from, read from the collections where asked for."""

from collections.abc import Sequence
from math import ceil

import numpy as np
import torch
from torch import Tensor

from loragen.core.generator.normalization import Normalization

FEWEST_SAMPLES = 64
MOST_AVERAGED = 4  # checkpoints that make a sample: enough to see past the noise of one


class CollectionSamples:
    """Normalised adapters ``[samples, tokens, token_dim]``, equally many of every dataset.

    One of each where there are many datasets, more where there are few; a sample is the mean of a
    few checkpoints, evenly spaced. `samples[first:last]` reads those tokens alone.
    """

    def __init__(self, collections: Sequence[np.ndarray], normalization: Normalization) -> None:
        """Of collections ``[checkpoints, tokens, token_dim]``, memory-mapped."""
        self.normalization = normalization
        each = ceil(FEWEST_SAMPLES / len(collections))
        self._groups = [
            (collection, group)
            for collection in collections
            for group in np.array_split(np.arange(len(collection)), min(each, len(collection)))
        ]

        counts = [min(each, len(collection)) for collection in collections]
        self.datasets = [i for i, count in enumerate(counts) for _ in range(count)]
        """Of every sample, the dataset that it is of."""

    @property
    def shape(self) -> tuple[int, int, int]:
        tokens, token_dim = self.normalization.mean.shape
        return len(self._groups), tokens, token_dim

    def __getitem__(self, tokens: slice) -> Tensor:
        found = [
            np.mean([collection[c, tokens] for c in _spaced(group)], axis=0)
            for collection, group in self._groups
        ]
        mean, scale = self.normalization.mean[tokens], self.normalization.scale[tokens]
        return (torch.from_numpy(np.stack(found)) - mean) / scale


def _spaced(group: np.ndarray) -> np.ndarray:
    """At most `MOST_AVERAGED` of the checkpoints, the last one among them."""
    places = np.linspace(len(group) - 1, 0, min(MOST_AVERAGED, len(group))).round()
    picked: np.ndarray = group[places.astype(np.int64)]
    return picked
