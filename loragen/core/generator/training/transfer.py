"""What a generator knows of every dataset when it writes an adapter from the others alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from loragen.core.generator.collections.prepared import PreparedSource
from loragen.core.generator.collections.samples import CollectionSamples
from loragen.core.generator.network import Network
from loragen.core.generator.training.pairs import (
    Others,
    condition_of,
    draw_texts,
    stacked_conditions,
)

MOST_TEXTS = 256
"""Of each dataset, when the decoder settles: more would hardly move a mean."""


class KnownDatasets:
    """The datasets that are learned from: their prompts and their adapters' coordinates.

    Nothing here grows with the number of checkpoints; prompts are read where they are needed.
    """

    def __init__(
        self,
        sources: Sequence[PreparedSource],
        texts: Sequence[Sequence[int]],
        network: Network,
        samples: CollectionSamples,
    ) -> None:
        """`texts[i]` are the indices of source i's texts that may be read."""
        self.sources = sources
        self.texts = [draw_texts(some, MOST_TEXTS, f"known:{i}") for i, some in enumerate(texts)]
        found = network.transfers.coordinates(samples)  # (samples, R)
        owner = torch.tensor(samples.datasets)
        sums = found.new_zeros(len(sources), found.shape[1]).index_add_(0, owner, found)
        self.coordinates = sums / torch.bincount(owner)[:, None]
        """``[datasets, R]``"""

    def to(self, device: torch.device) -> None:
        self.coordinates = self.coordinates.to(device)

    def written(self, network: Network, condition: Tensor, mask: Tensor, others: Others) -> Tensor:
        """``[batch, tokens, token_dim]``: as the other datasets alone would have the adapters."""
        known = network.features(others.condition, others.mask)
        coordinates = self.coordinates[others.datasets]
        return network.transfers.transferred(network.features(condition, mask), known, coordinates)

    @torch.no_grad()
    def settle(self, network: Network) -> None:
        """The network then writes from all of them."""
        device, training = self.coordinates.device, network.training
        network.eval()
        known = []
        for source, texts in zip(self.sources, self.texts, strict=True):
            condition, mask = stacked_conditions([condition_of(source, texts)])
            known.append(network.features(condition.to(device), mask.to(device)))
        network.transfers.settle(torch.cat(known), self.coordinates)
        network.train(training)
