"""Transfer: behaviour, with every adapter predicted from other datasets alone (leave-one-out).

Each prediction is made as if the adapter's own dataset had never been collected, so the generator
is trained for new datasets. The datasets that it may use are its support set. A decoder that trains
one adapter for all datasets (`TrainsOneAdapter`) predicts nothing in training: it leaves datasets
out in validation alone.
"""

from collections.abc import Sequence
from functools import cached_property, partial
from random import Random
from statistics import fmean
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor

from loragen.core.config import GenTrainConfig
from loragen.core.data.tokenize import Example
from loragen.core.errors import UsageError, counted
from loragen.core.generator.network import Network
from loragen.core.learning.arrays import SourceArrays
from loragen.core.learning.data import (
    PairBatch,
    TrainingData,
    condition_of,
    draw_texts,
    stack_conditions,
)
from loragen.core.learning.objectives.behaviour import Behaviour, BehaviourBatches, draw_rows
from loragen.core.learning.objectives.reconstruction import Losses
from loragen.core.learning.sources import TrainingSource
from loragen.core.plugins import find
from loragen.core.protocols import Automatic, SupportSet, TrainsOneAdapter

MIN_DATASETS = 2
"""Of fewer, nothing is left to predict from."""
MIN_FOR_AUTO = 3
"""Of fewer, leaving one out leaves one adapter, and nothing to choose from."""
COMPARED_DATASETS, COMPARED_ROWS = 64, 8
"""The most datasets, and the rows of each, on which left-out adapters are tried."""
PREDICTED_AT_ONCE = 8
"""Adapters predicted in one pass over the collection, which may be much larger than the memory."""
MAX_TEXTS = 256
"""Texts of each dataset when the decoder is fitted: more would hardly move a mean."""
ENCODER_TRAINS = "the encoder is trained (frozen: false)"


class TransferBatches(BehaviourBatches):
    """Adds a support set to every micro-batch, and leaves each adapter's own dataset out of it."""

    def __init__(
        self,
        data: TrainingData,
        process_index: int,
        num_processes: int,
        max_support: int | None = None,
    ) -> None:
        """`max_support` is the most datasets of a support set; None: all."""
        super().__init__(data, process_index, num_processes)
        self.max_support = max_support

    def __getitem__(self, k: int) -> PairBatch:
        random = Random(f"others:{self.seed}:{k}")
        datasets = [one.prompts_sha256 or str(index) for index, one in enumerate(self.sources)]
        distinct = list(dict.fromkeys(datasets))
        if self.max_support is not None and self.max_support < len(distinct):
            distinct = random.sample(distinct, self.max_support)
        drawn = set(distinct)
        chosen = [index for index, dataset in enumerate(datasets) if dataset in drawn]
        conditions = []
        for source in (self.sources[index] for index in chosen):
            texts = draw_texts(source.train_texts, self.prompts, f"prompts:{random.random()}")
            conditions.append(condition_of(source, texts))
        condition, mask = stack_conditions(conditions)
        same = partial(same_dataset, self.sources)
        own = [[same(index, one) for one in chosen] for _, index in self.own(k)[1]]
        support = SupportSet(condition, mask, torch.tensor(chosen), torch.tensor(own))
        return super().__getitem__(k)._replace(support=support)


class RowBatches(BehaviourBatches):
    """Micro-batches of labelled rows alone, all for one adapter."""

    def __getitem__(self, k: int) -> PairBatch:
        step, drawn = self.own(k)
        examples: list[Example] = []
        for position, index in drawn:
            rows = self.sources[index].rows
            assert rows is not None
            random = Random(f"rows:{self.seed}:{step}:{position}")
            examples += draw_rows(rows.training, self.rows_per_adapter, random)
        dim, no_pairs = self.sources[0].embeddings.shape[-1], torch.zeros(0, 0, 0)
        return PairBatch(
            torch.zeros(0, 0, 0, dim), no_pairs.bool(), no_pairs, self.collate(examples, 1)
        )


def same_dataset(sources: Sequence[SourceArrays], one: int, other: int) -> bool:
    """Returns whether two sources, given by their indices, are of the same dataset."""
    first, second = sources[one].prompts_sha256, sources[other].prompts_sha256
    return one == other or (first == second != "")


class Transfer(Behaviour):
    """Minimises the base model's loss with adapters that other datasets predict."""

    automatic = Automatic(
        10,
        "transfer",
        "the base and labelled rows of every dataset are available, and there are enough datasets "
        "to predict each from others",
    )
    # A dataset that resembles no other one has a large gradient, which would drown the rest:
    # without the limit the measured results are worse (docs/generating.md).
    gradient_clip_val = 1.0
    leaves_out = True

    class Config(BaseModel, extra="forbid"):
        """The other options are in the section `behaviour`."""

        max_support: int | None = Field(
            None,
            ge=MIN_DATASETS,
            description="Most datasets that a step predicts from, drawn at random; null: all. A "
            "step reads all their adapters.",
        )

    @classmethod
    def obstacle(cls, config: GenTrainConfig, sources: Sequence[TrainingSource]) -> str | None:
        if problem := super().obstacle(config, sources):
            return problem
        encoder = find("encoder", config.encoder.name)
        if not getattr(encoder.Config(**config.encoder.options), "frozen", True):
            return ENCODER_TRAINS
        needed = MIN_FOR_AUTO if config.training.objective == "auto" else MIN_DATASETS
        datasets = len({source.prompts_sha256 for source in sources})
        if datasets < needed:
            found = counted(datasets, "dataset")
            return f"{found}; it needs {needed}, to predict each from the others"
        return None

    def __init__(self, options: Any, data: TrainingData) -> None:
        """Raises UsageError if the encoder is trained, whatever its option is called."""
        super().__init__(options, data)
        if any(source.texts for source in data.sources):
            raise UsageError(f"training.objective transfer: {ENCODER_TRAINS}; choose another one")
        self.learning_rate = data.config.behaviour.learning_rate or 5e-4
        self.max_support = options.max_support
        self.decoder = find("decoder", data.config.decoder.name)

    def batches(self, process_index: int, num_processes: int) -> BehaviourBatches:
        if issubclass(self.decoder, TrainsOneAdapter):
            return RowBatches(self.data, process_index, num_processes)
        return TransferBatches(self.data, process_index, num_processes, self.max_support)

    def loss(self, network: Network, batch: PairBatch) -> Losses:
        if not isinstance(network.decoder, TrainsOneAdapter):
            return super().loss(network, batch)
        assert batch.rows is not None
        loss = self.base_loss(network.decoder.trained_adapter()[None], batch.rows)
        return loss, {"behaviour": loss.detach(), "loss": loss.detach()}

    def predict(self, network: Network, batch: PairBatch) -> Tensor:
        assert batch.support is not None
        return network.predict(batch.condition, batch.mask, batch.support)

    @cached_property
    def validation_support(self) -> tuple[Tensor, Tensor]:
        """One condition of every training dataset, ``[N, prompts, positions, dim]``, and a mask:
        always the same, of as many texts as in training."""
        count = self.data.config.data.prompts_per_condition
        return stack_conditions(
            [
                condition_of(source, draw_texts(source.train_texts, count, f"known:{index}"))
                for index, source in enumerate(self.data.sources)
            ]
        )

    def predict_for_validation(self, network: Network, batch: PairBatch) -> Tensor:
        return self._predict_left_out(network, batch.condition, batch.mask, [batch.source])

    def _predict_left_out(
        self, network: Network, condition: Tensor, mask: Tensor, own: Sequence[int | None]
    ) -> Tensor:
        """Returns the adapters of conditions, ``[conditions, tokens, token_dim]``, each without its
        training dataset in `own` and other sources of it, as for a new dataset; None: it is new."""
        sources, device = self.data.sources, condition.device
        known, known_mask = (tensor.to(device) for tensor in self.validation_support)
        everything = range(len(sources))
        left_out = [
            [one is not None and same_dataset(sources, one, i) for i in everything] for one in own
        ]
        without = torch.tensor(left_out, device=device)
        support = SupportSet(known, known_mask, torch.arange(len(sources)), without)
        return network.predict(condition, mask, support)

    @torch.no_grad()
    def accuracy_on_left_out(self, network: Network) -> tuple[float, float]:
        """Returns the share of training rows that the base answers right with the adapter of their
        dataset as it is predicted from the others, and with the collected adapter itself."""
        was_training, device = network.training, network.condition_mean.device
        network.eval()
        sources, count = self.data.sources, self.data.config.data.prompts_per_condition
        compared = range(0, len(sources), -(-len(sources) // COMPARED_DATASETS))
        shares: list[tuple[float, float]] = []
        for first in range(0, len(compared), PREDICTED_AT_ONCE):
            chosen = compared[first : first + PREDICTED_AT_ONCE]
            conditions = []
            for index in chosen:
                texts = draw_texts(sources[index].train_texts, count, f"compared:{index}")
                conditions.append(condition_of(sources[index], texts))
            condition, mask = (one.to(device) for one in stack_conditions(conditions))
            adapters = self._predict_left_out(network, condition, mask, chosen)
            for index, predicted in zip(chosen, adapters, strict=True):
                source, random = sources[index], Random(f"compared:{index}")
                assert source.rows is not None
                examples = draw_rows(source.rows.training, COMPARED_ROWS, random)
                rows = self.data.collate(examples).to(device)
                own = torch.from_numpy(np.array(source.tokens[-1])).to(device)
                collected = self.base_loss.normalization.normalize(own)
                of_predicted, of_collected = (
                    float(self.base_loss.accuracy(one[None], rows)[1])
                    for one in (predicted, collected)
                )
                shares.append((of_predicted, of_collected))
        network.train(was_training)
        predicted_share, collected_share = map(fmean, zip(*shares, strict=True))
        return predicted_share, collected_share

    @torch.no_grad()
    def finalize(self, network: Network) -> None:
        """Fits the network to all datasets, so that its forward pass gives what it has learned to
        predict. It knows each of them by more texts than a condition in training has."""
        was_training, device = network.training, network.condition_mean.device
        network.eval()
        conditions = (
            condition_of(source, draw_texts(source.train_texts, MAX_TEXTS, f"known:{index}"))
            for index, source in enumerate(self.data.sources)
        )
        network.fit((one[None].to(device), mask[None].to(device)) for one, mask in conditions)
        network.train(was_training)
