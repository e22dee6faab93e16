"""Normalisation of adapter tokens: a step of its own, exact to rounding.

What a collection's adapters share, above all the common LoRA initialisation, is random and cannot
be told from a prompt. So the mean adapter is kept as it is and a decoder learns deviations from
it, scaled to unit RMS per tensor: small matrices then weigh as much as large ones in the loss.

The trained part of a generator: a decoder, and the scale of the conditions that it reads.

What a decoder is made of, stage by stage: shapes, parameters and memory, before it is built.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from loragen.core.adapter.layout import Layout
from loragen.core.errors import UsageError
from loragen.core.generator.embeddings import TEXTS_AT_ONCE
from loragen.core.plugins import create, find
from loragen.core.protocols import DescribesChoices, Samples, StartsFromSamples, Transfers


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

    def predict(
        self, condition: Tensor, mask: Tensor, known: Tensor, known_mask: Tensor, targets: Tensor
    ) -> Tensor:
        """As `Transfers.predict`, for conditions that are not standardised."""
        known, condition = self._standard(known), self._standard(condition)
        return self.transfers.predict(condition, mask, known, known_mask, targets)

    def fit_known(self, known: Iterable[tuple[Tensor, Tensor]], targets: Tensor) -> None:
        """As `Transfers.fit`, for conditions that are not standardised."""
        self.transfers.fit(((self._standard(one), mask) for one, mask in known), targets)

    @property
    def transfers(self) -> Transfers:
        """The decoder, which has to be one that can transfer."""
        assert isinstance(self.decoder, Transfers)
        return self.decoder

    def train_transfer_only(self, prefixes: Sequence[str]) -> None:
        """Freezes all parameters but those of the decoder whose names start so."""
        for name, parameter in self.decoder.named_parameters():
            parameter.requires_grad_(name.startswith(tuple(prefixes)))

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


FLOAT = 4  # bytes
OPTIMIZER_FLOATS = 3  # a gradient and Adam's two moments for every trained parameter


@dataclass(frozen=True)
class Stage:
    name: str
    shape: tuple[int, ...]
    """Of the output, for a batch of one."""
    parameters: int

    @property
    def bytes(self) -> int:
        """Of the output, in float32."""
        return prod(self.shape) * FLOAT


@dataclass(frozen=True)
class Anatomy:
    condition: tuple[int, int, int]
    """``[prompts, positions, dim]`` that it was worked out for."""
    stages: list[Stage]
    parameters: int
    trained: int
    choices: list[str]
    """What the decoder has settled itself, in its own words."""

    @property
    def weights_bytes(self) -> int:
        return self.parameters * FLOAT

    @property
    def training_bytes(self) -> int:
        """Weights, gradients and moments; `pair_bytes` come on top for each pair of a batch."""
        return self.weights_bytes + self.trained * OPTIMIZER_FLOATS * FLOAT

    @property
    def pair_bytes(self) -> int:
        """Of the outputs of all stages together."""
        return sum(stage.bytes for stage in self.stages)

    def document(self) -> dict[str, Any]:
        """Plain data."""
        sizes = ("weights_bytes", "training_bytes", "pair_bytes")
        stages = [{**asdict(stage), "bytes": stage.bytes} for stage in self.stages]
        return {**asdict(self), "stages": stages, **{name: getattr(self, name) for name in sizes}}


def anatomy(
    decoder: str,
    options: Mapping[str, Any],
    layout: Layout,
    condition: tuple[int, int, int],
    transfers: bool = False,
) -> Anatomy:
    """Of a decoder for `layout`, fed with a condition ``[prompts, positions, dim]``; trained to
    transfer or as a whole.

    On torch's meta device: nothing is computed and nothing allocated. Raises UsageError where the
    options do not suit the layout.
    """
    with torch.device("meta"):
        network = new_network(decoder, options, condition[-1], layout).to("meta")
        mask = torch.ones(1, *condition[:2], dtype=torch.bool)
        found: list[Stage] = []
        for name, module in _parts(network.decoder, ""):
            module.register_forward_hook(_recorder(name, found))
        network.eval()(torch.empty(1, *condition), mask)
    if transfers:
        cls = find("decoder", decoder)
        network.train_transfer_only(cls.transfer_parameters(cls.Config(**options)))
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    decided = network.decoder.choices() if isinstance(network.decoder, DescribesChoices) else []
    return Anatomy(condition, found, _size(network), trained, decided)


def _parts(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """The children of a module; of a lone child or a list, its own children in its place."""
    children = dict(module.named_children())
    for name, child in children.items():
        path = f"{prefix}{name}"
        if isinstance(child, nn.ModuleList):
            yield from ((f"{path}.{index}", one) for index, one in enumerate(child))
        elif len(children) == 1 and any(True for _ in child.children()):
            yield from _parts(child, "")
        else:
            yield path, child


def _recorder(name: str, found: list[Stage]) -> Any:
    def record(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            found.append(Stage(name, tuple(output.shape[1:]), _size(module)))

    return record


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
