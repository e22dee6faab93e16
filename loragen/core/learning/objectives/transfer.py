"""Transfer: behaviour, with every adapter predicted from other datasets alone (leave-one-out).

Each prediction is made as if the adapter's own dataset had never been collected, so the generator
is trained for new datasets. The other datasets of a prediction are its support set.
"""

from collections.abc import Sequence
from random import Random
from typing import Any, cast

import torch
from torch import Tensor

from loragen.core.config import GenTrainConfig
from loragen.core.errors import UsageError
from loragen.core.generator.network import Network
from loragen.core.learning.arrays import AdapterSamples
from loragen.core.learning.data import (
    PairBatch,
    SupportSet,
    TrainingData,
    condition_of,
    draw_texts,
    stack_conditions,
)
from loragen.core.learning.objectives.behaviour import Behaviour, BehaviourBatches
from loragen.core.learning.sources import TrainingSource
from loragen.core.plugins import find
from loragen.core.protocols import Automatic, Transfers

DATASETS_PER_LEFT_OUT = 2
"""For every dataset that a step leaves out, another one is needed to predict from."""
MAX_SUPPORT = 64
"""Datasets of a support set: a limit, so that a step does not grow with their number."""
MAX_TEXTS = 256
"""Texts of each dataset when the decoder is fitted: more would hardly move a mean."""
ENCODER_TRAINS = "the encoder is trained (frozen: false)"


class TransferBatches(BehaviourBatches):
    """Adds a support set to every micro-batch: datasets that have no adapter in it."""

    def __getitem__(self, k: int) -> PairBatch:
        left_out = {self.sources[index].prompts_sha256 for _, index in self.drawn(k)[1]}
        random = Random(f"others:{self.seed}:{k}")
        others = [i for i, one in enumerate(self.sources) if one.prompts_sha256 not in left_out]
        chosen = sorted(random.sample(others, min(MAX_SUPPORT, len(others))))
        conditions = []
        for source in (self.sources[index] for index in chosen):
            texts = draw_texts(source.train_texts, self.prompts, f"prompts:{random.random()}")
            conditions.append(condition_of(source, texts))
        condition, mask = stack_conditions(conditions)
        batch = super().__getitem__(k)
        return batch._replace(support=SupportSet(condition, mask, torch.tensor(chosen)))


class Transfer(Behaviour):
    """Minimises the base model's loss with adapters that other datasets predict.

    Only what the decoder's `Transfers.transfer_parameters` names is trained.
    """

    batch_type = TransferBatches
    automatic = Automatic(
        10,
        "transfer",
        "the base and labelled rows of every dataset are available, and there are enough datasets "
        "to predict each from others",
    )
    # A dataset that resembles no other one has a large gradient, which would drown the rest:
    # without the limit the measured results are worse (docs/generating.md).
    gradient_clip_val = 1.0
    transfer_only = True

    @classmethod
    def obstacle(cls, config: GenTrainConfig, sources: Sequence[TrainingSource]) -> str | None:
        if problem := super().obstacle(config, sources):
            return problem
        if config.training.objective not in ("auto", "transfer"):
            return "it freezes most of the decoder, and is not combined with other objectives"
        decoder = find("decoder", config.decoder.name)
        options = decoder.Config(**config.decoder.options)
        if not issubclass(decoder, Transfers) or decoder.transfer_parameters(options) is None:
            return f"the decoder {config.decoder.name} cannot transfer, as it is configured"
        encoder = find("encoder", config.encoder.name)
        if not getattr(encoder.Config(**config.encoder.options), "frozen", True):
            return ENCODER_TRAINS
        needed = config.behaviour.batch_size * DATASETS_PER_LEFT_OUT
        datasets = len({source.prompts_sha256 for source in sources})
        if datasets < needed:
            return (
                f"{datasets} datasets; behaviour.batch_size {config.behaviour.batch_size} leaves "
                f"too few others, it needs {needed}"
            )
        return None

    def __init__(self, options: Behaviour.Config, data: TrainingData) -> None:
        """Raises UsageError if the encoder is trained, whatever its option is called."""
        super().__init__(options, data)
        if any(source.texts for source in data.sources):
            raise UsageError(f"training.objective transfer: {ENCODER_TRAINS}; choose another one")
        self.learning_rate = data.config.behaviour.learning_rate or 5e-4
        self.samples = AdapterSamples(
            [source.tokens for source in data.sources], data.normalization
        )
        self._coordinates: Tensor | None = None

    def prepare(self, network: Network) -> None:
        """Freezes all but the parameters that the decoder's prediction trains."""
        decoder = find("decoder", self.data.config.decoder.name)
        options = decoder.Config(**self.data.config.decoder.options)
        network.train_transfer_only(decoder.transfer_parameters(options))

    def predict(self, network: Network, batch: PairBatch) -> Tensor:
        support = cast(SupportSet, batch.support)
        coordinates = self.coordinates(network)[support.datasets]
        return network.predict(
            batch.condition, batch.mask, support.condition, support.mask, coordinates
        )

    def coordinates(self, network: Network) -> Tensor:
        """Returns the mean coordinates of each dataset's adapters, ``[datasets, R]``.

        They are computed once, along the directions that the network has then. These are frozen,
        and a resumed run loads them from its checkpoint. The result is on the device of the
        network, which a trainer may change.
        """
        if self._coordinates is None:
            decoder: Any = network.decoder
            found = decoder.coordinates(self.samples)  # (samples, R)
            owner = torch.tensor(self.samples.datasets, device=found.device)
            sums = found.new_zeros(len(self.data.sources), found.shape[1])
            self._coordinates = sums.index_add_(0, owner, found) / torch.bincount(owner)[:, None]
        self._coordinates = self._coordinates.to(network.condition_mean.device)
        return self._coordinates

    @torch.no_grad()
    def finalize(self, network: Network) -> None:
        """Fits the network to all datasets, so that its forward pass gives what it has learned to
        predict."""
        coordinates, was_training = self.coordinates(network), network.training
        network.eval()
        conditions = (
            condition_of(source, draw_texts(source.train_texts, MAX_TEXTS, f"known:{i}"))
            for i, source in enumerate(self.data.sources)
        )
        device = coordinates.device
        support = ((one[None].to(device), mask[None].to(device)) for one, mask in conditions)
        network.fit_transfer(support, coordinates)
        network.train(was_training)
