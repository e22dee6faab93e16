"""What a generator knows of every dataset when it writes an adapter from the others alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from loragen.core.generator.network import Network
from loragen.core.learning.arrays import CollectionSamples, SourceArrays
from loragen.core.learning.batches import Others, condition_of, draw_texts, stacked_conditions

MOST_TEXTS = 256
"""Of each dataset, when the decoder settles: more would hardly move a mean."""


class KnownDatasets:
    """The datasets that are learned from: their prompts and their adapters' coordinates.

    Nothing here grows with the number of checkpoints; prompts are read where they are needed. What
    it gives is on the device where the network is then: a trainer may move that.
    """

    def __init__(
        self,
        sources: Sequence[SourceArrays],
        texts: Sequence[Sequence[int]],
        samples: CollectionSamples,
    ) -> None:
        """`texts[i]` are the indices of source i's texts that may be read."""
        self.sources, self.samples = sources, samples
        self.texts = [draw_texts(some, MOST_TEXTS, f"known:{i}") for i, some in enumerate(texts)]
        self._coordinates: Tensor | None = None

    def coordinates(self, network: Network) -> Tensor:
        """``[datasets, R]``, along the directions that the network has when it is first asked: they
        stay, and of a training that goes on they are the checkpoint's by then."""
        if self._coordinates is None:
            found = network.transfers.coordinates(self.samples)  # (samples, R)
            owner = torch.tensor(self.samples.datasets, device=found.device)
            sums = found.new_zeros(len(self.sources), found.shape[1]).index_add_(0, owner, found)
            self._coordinates = sums / torch.bincount(owner)[:, None]
        self._coordinates = self._coordinates.to(network.condition_mean.device)
        return self._coordinates

    def written(self, network: Network, condition: Tensor, mask: Tensor, others: Others) -> Tensor:
        """``[batch, tokens, token_dim]``: as the other datasets alone would have the adapters."""
        coordinates = self.coordinates(network)[others.datasets]
        return network.predict(condition, mask, others.condition, others.mask, coordinates)

    @torch.no_grad()
    def settle(self, network: Network) -> None:
        """The network then writes from all of them."""
        coordinates, training = self.coordinates(network), network.training
        device = coordinates.device
        network.eval()
        known = (
            stacked_conditions([condition_of(source, texts)])
            for source, texts in zip(self.sources, self.texts, strict=True)
        )
        network.fit_known(((one.to(device), mask.to(device)) for one, mask in known), coordinates)
        network.train(training)
