"""The network of a generator: a decoder with standardised conditions and normalised adapters.

`Normalization` scales adapters, `Network` standardises the conditions of a decoder, and
`summarize_decoder` lists the modules and the memory of a decoder before it is built.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from loragen.core.adapter.layout import Layout
from loragen.core.errors import UsageError
from loragen.core.generator.embeddings import chunks
from loragen.core.plugins import create, find
from loragen.core.protocols import DescribesChoices, SupportSet, Transfers

MIN_SPREAD = 1e-6
FLOAT = 4  # bytes
OPTIMIZER_FLOATS = 3  # a gradient and Adam's two moments for every trained parameter


@dataclass(frozen=True)
class Normalization:
    """The mean adapter, and the deviation of each tensor from it.

    The part that all adapters share, above all their LoRA initialisation, is random and cannot be
    predicted from prompts. Therefore the mean is stored, and a decoder learns deviations from it,
    scaled to unit RMS per tensor, so that small matrices count as much in the loss as large ones.
    """

    mean: Tensor
    """``[tokens, token_dim]`` float32: the mean adapter."""
    scale: Tensor
    """``[tokens, 1]`` float32: RMS deviation from the mean, of the tensor a token belongs to."""

    @classmethod
    def fit(cls, layout: Layout, collections: Iterable[np.ndarray]) -> "Normalization":
        """Fits the checkpoints of each dataset, ``[checkpoints, tokens, token_dim]``, with equal
        weight for each dataset, in one pass that holds one checkpoint at a time."""
        total = np.zeros((layout.tokens, layout.token_dim))
        squares = np.zeros(layout.tokens)
        datasets = 0
        for collection in collections:
            datasets += 1
            for tokens in collection:
                wide = tokens.astype(np.float64)
                total += wide / len(collection)
                squares += np.square(wide).sum(axis=1) / len(collection)
        mean = total / datasets
        deviation = np.maximum(squares / datasets - np.square(mean).sum(axis=1), 0)
        owners = layout.owners()
        sizes = np.array([spec.size for spec in layout.tensors])
        variance = np.bincount(owners, weights=deviation, minlength=len(sizes)) / sizes
        # A constant tensor needs no scale, but rounding may leave it a trace of variance.
        moves = variance > 1e-12 * np.maximum(
            np.bincount(owners, squares) / sizes / datasets, 1e-30
        )
        scale = np.where(moves, np.sqrt(variance), 1.0)[owners][:, None]
        return cls(torch.from_numpy(mean).float(), torch.from_numpy(scale).float())

    def without_mean(self) -> "Normalization":
        """Returns the normalization of decoders that combine adapters, which needs no mean.

        The scales are rounded to powers of two, so that dividing by one and multiplying again
        changes no bit: a prediction is then independent of an adapter that it leaves out, although
        that one counts in the scale.
        """
        return Normalization(torch.zeros_like(self.mean), self.scale.log2().round().exp2())

    def normalize(self, tokens: Tensor) -> Tensor:
        return (tokens.to(self.mean) - self.mean) / self.scale

    def denormalize(self, normalized: Tensor) -> Tensor:
        return normalized * self.scale + self.mean

    def of(self, tokens: slice) -> "Normalization":
        """Returns the normalization of these tokens alone."""
        return Normalization(self.mean[tokens], self.scale[tokens])

    def to(self, device: torch.device) -> "Normalization":
        return Normalization(self.mean.to(device), self.scale.to(device))


def importance(layout: Layout, collections: Sequence[np.ndarray]) -> Tensor:
    """Returns the weight of each token's error, ``[tokens, 1]`` float32, with mean 1 over values.

    The weight is ``1 / (1 + v)``; v is the token's variance within datasets over that between
    datasets. If the checkpoints of one dataset scatter as widely as datasets do, the values are
    mostly noise. This follows the importance of Drag-and-Drop LLMs (arXiv 2506.16406), which is the
    variance between checkpoints. It is one pass, with one checkpoint in memory at a time.
    """
    within, squared_means = np.zeros(layout.tokens), np.zeros(layout.tokens)
    total = np.zeros((layout.tokens, layout.token_dim))
    for collection in collections:
        own, squares = np.zeros(total.shape), np.zeros(layout.tokens)
        for tokens in collection:
            own += np.divide(tokens, len(collection), dtype=np.float64)
            squares += np.square(tokens, dtype=np.float64).sum(axis=1) / len(collection)
        squared = np.square(own).sum(axis=1)
        within += np.maximum(squares - squared, 0)
        squared_means += squared
        total += own
    between = squared_means - np.square(total).sum(axis=1) / len(collections)
    between = np.maximum(between, 1e-30 + 1e-12 * squared_means)
    weights = 1 / (1 + within / between)
    values = layout.mask().sum(dim=1).numpy()  # of each token, without padding
    return torch.from_numpy(weights / np.average(weights, weights=values)).float()[:, None]


class Network(nn.Module):
    """A decoder whose conditions have zero mean and unit variance in every dimension.

    Learning rates then do not depend on the scale of the encoder's embeddings.
    """

    condition_mean: Tensor
    condition_spread: Tensor

    def __init__(self, decoder: nn.Module, condition_dim: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.register_buffer("condition_mean", torch.zeros(condition_dim))
        self.register_buffer("condition_spread", torch.ones(condition_dim))

    def forward(self, condition: Tensor, mask: Tensor) -> Tensor:
        """Maps ``[batch, prompts, positions, dim]`` to normalised tokens ``[batch, tokens,
        token_dim]``."""
        tokens: Tensor = self.decoder(self._standardized(condition), mask)
        return tokens

    def predict(self, condition: Tensor, mask: Tensor, support: SupportSet) -> Tensor:
        """Returns the result of `Transfers.predict` for conditions that are not standardised."""
        assert isinstance(self.decoder, Transfers)
        known = support._replace(condition=self._standardized(support.condition))
        return self.decoder.predict(self._standardized(condition), mask, known)

    def fit(self, support_conditions: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Calls `Transfers.fit` with conditions that are not standardised yet."""
        assert isinstance(self.decoder, Transfers)
        self.decoder.fit((self._standardized(one), mask) for one, mask in support_conditions)

    def coefficients(self, condition: Tensor, mask: Tensor) -> Tensor | None:
        """Returns `Transfers.coefficients` ``[batch, N]``; None for a decoder without any."""
        if not isinstance(self.decoder, Transfers):
            return None
        return self.decoder.coefficients(self._standardized(condition), mask)

    def _standardized(self, condition: Tensor) -> Tensor:
        return (condition - self.condition_mean) / self.condition_spread


def condition_scale(embedded: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[Tensor, Tensor]:
    """Returns the mean and the standard deviation ``[dim]`` of ``(embeddings [texts, positions,
    dim], mask [texts, positions])`` of every dataset, with equal weight for each dataset."""
    means, squares = [], []
    for embeddings, mask in embedded:
        total = np.zeros((2, embeddings.shape[-1]))  # of the values and of their squares
        for values, valid in chunks(embeddings, mask):
            kept = values[valid].astype(np.float64)
            total += kept.sum(0), np.square(kept).sum(0)
        mean_of_one, square_of_one = total / np.count_nonzero(mask)
        means.append(mean_of_one)
        squares.append(square_of_one)
    mean = np.mean(means, axis=0)
    spread = np.sqrt(np.maximum(np.mean(squares, axis=0) - np.square(mean), 0))
    spread = np.maximum(spread, MIN_SPREAD)
    return torch.from_numpy(mean).float(), torch.from_numpy(spread).float()


def new_network(
    name: str,
    options: Mapping[str, Any],
    condition_dim: int,
    layout: Layout,
    scale: tuple[Tensor, Tensor] | None = None,
) -> Network:
    """Returns an untrained network for the layout, and for conditions of this `condition_scale`.
    Raises UsageError if the options do not fit the layout (a ValueError of the plugin)."""
    try:
        decoder = create("decoder", name, options, condition_dim, layout.grid())
    except ValueError as error:
        raise UsageError(f"decoder {name}: {error}") from None
    network = Network(decoder, condition_dim)
    if scale:
        network.condition_mean.copy_(scale[0])
        network.condition_spread.copy_(scale[1])
    return network


@dataclass(frozen=True)
class StageSummary:
    """One module of a decoder."""

    name: str
    shape: tuple[int, ...]
    """The shape of the output, for a batch of one."""
    parameters: int

    @property
    def bytes(self) -> int:
        """The size of the output, in float32."""
        return prod(self.shape) * FLOAT


@dataclass(frozen=True)
class DecoderSummary:
    """The modules of a decoder, and the memory that its training needs."""

    condition: tuple[int, int, int]
    """The input: ``[prompts, positions, dim]``."""
    stages: list[StageSummary]
    parameters: int
    trained: int
    choices: list[str]
    """One sentence for each size that the decoder has chosen itself."""

    @property
    def weights_bytes(self) -> int:
        return self.parameters * FLOAT

    @property
    def training_bytes(self) -> int:
        """The memory of weights, gradients and moments, without the pairs of a batch."""
        return self.weights_bytes + self.trained * OPTIMIZER_FLOATS * FLOAT

    @property
    def pair_bytes(self) -> int:
        """The memory of each pair in a batch: the outputs of all stages."""
        return sum(stage.bytes for stage in self.stages)

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data."""
        sizes = ("weights_bytes", "training_bytes", "pair_bytes")
        stages = [{**asdict(stage), "bytes": stage.bytes} for stage in self.stages]
        return {**asdict(self), "stages": stages, **{name: getattr(self, name) for name in sizes}}


def summarize_decoder(
    decoder: str,
    options: Mapping[str, Any],
    layout: Layout,
    condition: tuple[int, int, int],
    datasets: int = 1,
) -> DecoderSummary:
    """Summarises a decoder for `layout` and a condition ``[prompts, positions, dim]``.

    `datasets` are those trained on. The decoder runs on torch's meta device: nothing is computed or
    allocated. Raises UsageError if the options do not fit the layout.
    """
    stages: list[StageSummary] = []

    def recorder(name: str) -> Any:
        def record(module: nn.Module, _: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                parameters = sum(p.numel() for p in module.parameters())
                stages.append(StageSummary(name, tuple(output.shape[1:]), parameters))

        return record

    with torch.device("meta"):
        network = new_network(decoder, options, condition[-1], layout).to("meta")
        if isinstance(network.decoder, Transfers):
            network.decoder.use_adapters(_Unread((datasets, layout.tokens, layout.token_dim)))
        mask = torch.ones(1, *condition[:2], dtype=torch.bool)
        for name, module in _stages(network.decoder, ""):
            module.register_forward_hook(recorder(name))
        network.eval()(torch.empty(1, *condition), mask)
    sizes = [(p.numel(), p.requires_grad) for p in network.parameters()]
    trained = sum(size for size, requires_grad in sizes if requires_grad)
    choices = network.decoder.choices() if isinstance(network.decoder, DescribesChoices) else []
    return DecoderSummary(condition, stages, sum(size for size, _ in sizes), trained, choices)


class _Unread(NamedTuple):
    """Collected adapters of which only the shape is known."""

    shape: tuple[int, int, int]

    def read(self, datasets: Sequence[int], tokens: slice) -> Tensor:
        return torch.empty(len(datasets), len(range(*tokens.indices(self.shape[1]))), self.shape[2])


def method(decoder: str) -> str:
    """Returns the first line of a decoder's docstring, without the full stop: what makes an
    adapter."""
    text = inspect.cleandoc(find("decoder", decoder).__doc__ or "not described")
    return text.partition("\n")[0].removesuffix(".")


def _stages(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Yields the children of a module by name; lists and an only child are replaced by theirs."""
    children = dict(module.named_children())
    for name, child in children.items():
        path = f"{prefix}{name}"
        if isinstance(child, nn.ModuleList):
            yield from ((f"{path}.{index}", one) for index, one in enumerate(child))
        elif len(children) == 1 and any(True for _ in child.children()):
            yield from _stages(child, "")
        else:
            yield path, child
