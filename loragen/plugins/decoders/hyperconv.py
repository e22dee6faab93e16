"""Principal components of adapters that are too large to hold all at once, and where adapters lie
along them.

From the features of some datasets to their coordinates, by ridge regression.

The derived geometry: a feature map over the adapter, cell by cell, that steers directions.

HyperConv: a condition becomes a feature map over the adapter, convolved along each axis.
"""

import math
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

from loragen.core.protocols import Samples, TokenGrid
from loragen.plugins.decoders._feature_maps import FeatureMaps

EPSILON = 1e-6
CHUNK = 2**24  # values of all samples at a time: 64 MiB in float32


def principal_directions(samples: Samples, most: int) -> Tensor:
    """At most `most` components as ``[tokens, components, token_dim]``, the strongest first.

    Each is scaled by its standard deviation over the samples: a coefficient of 1 goes as far as
    the samples typically do. Through the samples' inner products (S x S): it holds the answer and
    one chunk, whatever the number of samples. Fewer where the samples span fewer dimensions.
    """
    count, tokens, dim = samples.shape
    step = max(1, CHUNK // (count * dim))
    chunks = [slice(first, first + step) for first in range(0, tokens, step)]
    products = torch.zeros(count, count, dtype=torch.float64)
    for chunk in chunks:
        flat = samples[chunk].flatten(1).double()  # (S, values)
        products += flat @ flat.T
    variance, vectors = torch.linalg.eigh(products)  # ascending
    spans = int((variance > 1e-10 * variance[-1].clamp(min=1e-30)).sum())
    kept = min(most, spans)
    # X = U S V^T: component k is u_k^T X / s_k, and its scale s_k / sqrt(S).
    weights = (vectors[:, -kept:].flip(1) / count**0.5).float() if kept else torch.zeros(count, 0)
    directions = torch.empty(tokens, kept, dim)
    for chunk in chunks:
        directions[chunk] = torch.einsum("sk,std->tkd", weights, samples[chunk])
    return directions


def coordinates_along(directions: Tensor, samples: Samples) -> Tensor:
    """``[S, R]``: the mixture of ``directions [tokens, R, token_dim]`` that is closest to each of
    the samples, on the CPU as they are. It holds the answer and one chunk."""
    count, tokens, dim = samples.shape
    rank = directions.shape[1]
    step = max(1, CHUNK // (count * dim))
    gram = torch.zeros(rank, rank, dtype=torch.float64)
    inner = torch.zeros(rank, count, dtype=torch.float64)
    for first in range(0, tokens, step):
        chunk = slice(first, first + step)
        along = directions[chunk].cpu().transpose(0, 1).flatten(1).double()  # (R, values)
        gram += along @ along.T
        inner += along @ samples[chunk].flatten(1).double().T
    ridge = EPSILON * gram.diagonal().mean() * torch.eye(rank, dtype=torch.float64)
    return torch.linalg.solve(gram + ridge, inner).T.float()


START = 0.3


class Ridge(nn.Module):
    """Regresses coordinates on features, in closed form and differentiably.

    The penalty is learned: how much a single dataset is to be believed.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features
        self.log_penalty = nn.Parameter(torch.tensor(math.log(START)))

    def forward(self, known: Tensor, coordinates: Tensor) -> Tensor:
        """``known [D, F]``, ``coordinates [D, R]`` -> weights ``[F + 1, R]``, the last row for a
        constant feature. In the dual form, which inverts D x D."""
        with torch.autocast(known.device.type, enabled=False):
            x = with_constant(known)  # (D, F + 1)
            kernel = x @ x.T / self.features
            penalty = self.log_penalty.exp() * torch.eye(len(x), dtype=x.dtype, device=x.device)
            return x.T @ _solved(kernel + penalty, coordinates.to(x.dtype)) / self.features


def with_constant(features: Tensor) -> Tensor:
    """In float32 at least, which solving needs."""
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    return torch.cat([wide, wide.new_ones(len(wide), 1)], dim=1)


def _solved(matrix: Tensor, right: Tensor) -> Tensor:
    if matrix.device.type == "mps":  # its gradients were wrong up to torch 2.12 (pytorch#175192)
        return torch.linalg.solve(matrix.cpu(), right.cpu()).to(matrix.device)
    return torch.linalg.solve(matrix, right)


FEWEST_DIRECTIONS, MOST_DIRECTIONS = 4, 32


class CellMap(nn.Module):
    """The derived geometry: a map over the cells, whose channels steer directions."""

    def __init__(self, config: "HyperConv.Config", condition_dim: int, grid: TokenGrid) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_dim
        cell, shape = cells(grid)
        rank = directions_for(config, grid)
        self.read = ConditionReader(condition_dim, 2 * width, config.dropout)
        self.expand = Expander(2 * width, (*shape, width))
        self.blocks = nn.ModuleList(
            HyperConvBlock(width, config.kernel_size) for _ in range(config.blocks)
        )
        self.steer = Steering(2 * width, width, rank)
        self.project = Directions(rank, cell, grid, config.train_directions)

    def forward(self, condition: Tensor, mask: Tensor) -> Tensor:
        read = self.read(condition, mask)  # (B, 2 C)
        x = self.expand(read)  # (B, N, L, C)
        for block in self.blocks:
            x = block(x)  # (B, N, L, C)
        coefficients = self.steer(read, x)  # (B, N, L, R)
        tokens: Tensor = self.project(coefficients)  # (B, tokens, token_dim)
        return tokens

    def transferred(self, features: Tensor, known: Tensor, coordinates: Tensor) -> Tensor:
        weights = self.steer.ridge(known, coordinates)  # (2 C + 1, R)
        common = with_constant(features) @ weights  # (B, R)
        layers, kinds, _ = self.expand.place.shape
        tokens: Tensor = self.project(common[:, None, None].expand(-1, layers, kinds, -1))
        return tokens

    @torch.no_grad()
    def settle(self, known: Tensor, coordinates: Tensor) -> None:
        weights = self.steer.ridge(known, coordinates)
        self.steer.common.weight.copy_(weights[:-1].T)
        self.steer.common.bias.copy_(weights[-1])

    def choices(self) -> list[str]:
        layers, kinds, width = self.expand.place.shape
        tokens, rank, dim = self.project.directions.shape
        most = self.config.max_parameters
        why = (
            f"max_parameters {most:,} over that, but {FEWEST_DIRECTIONS} to {MOST_DIRECTIONS} "
            "(rank: auto)"
            if self.config.rank == "auto"
            else "as configured (rank)"
        )
        size = f"{layers} layers x {kinds} kinds of matrix x {width} channels"
        then = "train (train_directions)"
        if self.steer.ridge.log_penalty.requires_grad:
            then = "stay: to transfer, the reading alone trains"
        elif not self.config.train_directions:
            then = "stay (train_directions: false)"
        return [
            f"feature map: {size}, from the adapter and hidden_dim",
            f"{rank} directions of {tokens * dim:,} values: {why}",
            f"the directions start as the principal components of the checkpoints and {then}",
        ]


class ConditionReader(nn.Module):
    """A set of prompts -> one vector, whatever their number and order.

    Each prompt is read on its own and the readings are averaged, so that a few prompts that the
    encoder places oddly are outvoted. A reading is linear and what a hidden layer, silent at first,
    makes of it beside: what is new in a prompt is mostly a new mixture of what was seen.
    """

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(dim, hidden)
        last = nn.Linear(hidden, hidden)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.bend = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), last)

    def forward(self, condition: Tensor, mask: Tensor) -> Tensor:
        kept = mask.unsqueeze(-1)  # (B, N, P, 1)
        condition = self.dropout(condition)
        read = self.linear(condition) + self.bend(condition)  # (B, N, P, hidden)
        total = torch.where(kept, read, 0.0).sum(dim=(1, 2))
        return total / kept.sum(dim=(1, 2)).clamp(min=1)  # (B, hidden)


class Expander(nn.Module):
    """A vector in every cell of the map ``(N, L, C)``, beside what the cell itself is."""

    def __init__(self, hidden: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.spread = nn.Linear(hidden, shape[2])
        self.place = nn.Parameter(torch.randn(shape) * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.spread(x)[:, None, None] + self.place  # (B, N, L, C)


class Steering(nn.Module):
    """How far to go along each direction: the same in all cells at first, then as the map says.

    What is common may also be regressed from other datasets, in place of being learned."""

    def __init__(self, hidden: int, width: int, rank: int) -> None:
        super().__init__()
        self.common = nn.Linear(hidden, rank)
        self.ridge = Ridge(hidden).requires_grad_(False)  # but by `train_transfer_only`
        self.norm = nn.LayerNorm(width)
        self.correct = nn.Linear(width, rank)
        nn.init.zeros_(self.correct.weight)
        nn.init.zeros_(self.correct.bias)

    def forward(self, read: Tensor, x: Tensor) -> Tensor:
        return self.common(read)[:, None, None] + self.correct(self.norm(x))  # (B, N, L, R)


class Directions(nn.Module):
    """Coefficients ``[B, N, L, R]`` times the directions of each token, ``[tokens, R, dim]``."""

    cell: Tensor

    def __init__(self, rank: int, cell: np.ndarray, grid: TokenGrid, trained: bool) -> None:
        super().__init__()
        start = torch.randn(grid.tokens, rank, grid.token_dim) * rank**-0.5
        self.directions = nn.Parameter(start, requires_grad=trained)
        self.register_buffer("cell", torch.from_numpy(cell), persistent=False)

    def forward(self, coefficients: Tensor) -> Tensor:
        of_token = coefficients.flatten(1, 2)[:, self.cell]  # (B, tokens, R)
        tokens = torch.bmm(of_token.transpose(0, 1), self.directions)  # (tokens, B, token_dim)
        return tokens.transpose(0, 1)

    @torch.no_grad()
    def start_from(self, samples: Samples) -> None:
        """The principal components of the samples, as long as they reach; the rest stay small."""
        found = principal_directions(samples, self.directions.shape[1])  # (tokens, R', dim)
        self.directions.mul_(0.1)
        self.directions[:, : found.shape[1]] = found


class HyperConvBlock(nn.Module):
    """ConvW -> ConvH -> ConvL on ``[B, N, L, C]``, each mixing the axis it is named after.

    Starts as the identity: the last convolution is zero at first, so that depth costs nothing
    until it helps.
    """

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.conv_w = nn.Linear(width, width)  # a 1 x 1 convolution with the channels last
        self.conv_h = AxisConv(width, kernel, axis=1)
        self.conv_l = AxisConv(width, kernel, axis=2)
        self.act = nn.GELU()
        self.out = nn.Linear(width, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv_w(self.norm(x))  # (B, N, L, C)
        y = self.act(self.conv_h(y))
        y = self.act(self.conv_l(y))
        return x + self.out(y)


class AxisConv(nn.Module):
    """A depthwise convolution along one axis of ``[B, N, L, C]``, zero beyond the border.

    Written as shifted multiply-adds: with channels last this needs no transpose and is faster on
    a CPU than a grouped convolution.
    """

    def __init__(self, width: int, kernel: int, axis: int) -> None:
        super().__init__()
        self.axis, self.reach = axis, kernel // 2
        self.weight = nn.Parameter(torch.randn(2 * self.reach + 1, width) * kernel**-0.5)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[self.axis]
        y = x * self.weight[self.reach] + self.bias
        for shift in range(1, min(self.reach, size - 1) + 1):
            ahead = x.narrow(self.axis, shift, size - shift) * self.weight[self.reach + shift]
            behind = x.narrow(self.axis, 0, size - shift) * self.weight[self.reach - shift]
            y = y + _placed(ahead, self.axis, 0, shift) + _placed(behind, self.axis, shift, 0)
        return y


def _placed(x: Tensor, axis: int, before: int, after: int) -> Tensor:
    """`x` with zeros before and after it along an axis of four."""
    padding = [0, 0] * (3 - axis) + [before, after]
    return nn.functional.pad(x, padding)


def cells(grid: TokenGrid) -> tuple[np.ndarray, tuple[int, int]]:
    """Each token's cell in the flattened map, ``[tokens]``, and the map's (layers, kinds): a kind
    is a matrix of a module, the same in every layer."""
    matrices = int(grid.matrix.max()) + 1
    kind = np.unique(grid.module * matrices + grid.matrix, return_inverse=True)[1]
    kinds = int(kind.max()) + 1
    return grid.layer * kinds + kind, (int(grid.layer.max()) + 1, kinds)


def directions_for(config: "HyperConv.Config", grid: TokenGrid) -> int:
    """R, as configured or as many as `max_parameters` allows."""
    if config.rank != "auto":
        return config.rank
    allowed = config.max_parameters // (grid.tokens * grid.token_dim)
    return min(max(allowed, FEWEST_DIRECTIONS), MOST_DIRECTIONS)


class HyperConv(nn.Module):
    """A hyper-convolutional decoder, after Drag-and-Drop LLMs (arXiv 2506.16406).

    With `shapes` it has the paper's geometry (see `_feature_maps.FeatureMaps`). Without, the
    feature map ``(N, L, C)`` covers the adapter cell by cell: N layers of the base model, L kinds
    of matrix in a layer (q_proj's lora_A, ...), C channels. It decides how far the adapter goes, in
    each cell, along a few directions of weight space, rather than every single weight::

        read      [B, prompts, positions, dim] -> each prompt on its own, averaged -> [B, hidden]
        expand    [B, N, L, C]   the condition, and what each cell adds of its own
        blocks    [B, N, L, C]   ConvW (mixes channels) -> ConvH (along the layers) -> ConvL (along
                                 the kinds), residual, normalised
        steer     [B, N, L, R]   coefficients of R directions: common ones + each cell's correction
        project   [B, tokens, token_dim]   sum over the directions of a cell's tokens

    The directions start as the principal components of the collected adapters (`start_from`), so
    training begins where a linear model of the collection ends. Parameters: the directions have
    ``R · tokens · token_dim``; `rank: auto` takes as many as `max_parameters` allows, between 4 and
    32. All else is a few millions, whatever the size of the adapter.

    A transfer trains what is read and settles the common coefficients; what the map would correct
    of them stays 0.
    """

    class Config(BaseModel, extra="forbid"):
        blocks: int = Field(3, ge=0, description="Blocks of ConvW -> ConvH -> ConvL.")
        hidden_dim: int = Field(384, ge=1, description="Channels C of the feature map.")
        kernel_size: Literal[1, 3, 5, 7] = Field(
            3, description="Kernel of the convolutions along layers, kinds or map axes."
        )
        rank: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
            "auto", description="Directions R; auto: what max_parameters allows, 4 to 32."
        )
        train_directions: bool = Field(
            True, description="Whether the directions train, or stay the principal components."
        )
        dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the condition.")
        max_parameters: int = Field(
            40_000_000, ge=1, description="Most parameters of the directions (rank: auto)."
        )
        shapes: list[tuple[int, int, int]] | None = Field(
            None,
            min_length=2,
            description="The paper's geometry: maps [N, L, C], the condition's to the tokens'.",
        )

        @model_validator(mode="after")
        def _one_geometry(self) -> "HyperConv.Config":
            fields = type(self).model_fields
            others = [name for name in fields if name not in ("shapes", "kernel_size")]
            changed = [name for name in others if getattr(self, name) != fields[name].default]
            if self.shapes and changed:
                raise ValueError(
                    f"{', '.join(changed)} and shapes: the paper's geometry has shapes and "
                    "kernel_size alone"
                )
            return self

    def __init__(self, config: Config, condition_dim: int, grid: TokenGrid) -> None:
        """Raises ValueError where the last of `shapes` has too few values."""
        super().__init__()
        self.body: FeatureMaps | CellMap
        if config.shapes:
            self.body = FeatureMaps(
                config.shapes, condition_dim, config.kernel_size, grid.tokens, grid.token_dim
            )
        else:
            self.body = CellMap(config, condition_dim, grid)

    def forward(self, condition: Tensor, mask: Tensor) -> Tensor:
        tokens: Tensor = self.body(condition, mask)
        return tokens

    def start_from(self, samples: Samples) -> None:
        """Before the first step: the directions from examples of what is to be generated."""
        if isinstance(self.body, CellMap):
            self.body.project.start_from(samples)

    def choices(self) -> list[str]:
        return self.body.choices()

    @classmethod
    def can_transfer(cls, config: Config) -> bool:
        return config.shapes is None

    def coordinates(self, samples: Samples) -> Tensor:
        return coordinates_along(self._cell_map.project.directions.detach(), samples)

    def features(self, condition: Tensor, mask: Tensor) -> Tensor:
        read: Tensor = self._cell_map.read(condition, mask)
        return read

    def transferred(self, features: Tensor, known: Tensor, coordinates: Tensor) -> Tensor:
        return self._cell_map.transferred(features, known, coordinates)

    def settle(self, known: Tensor, coordinates: Tensor) -> None:
        self._cell_map.settle(known, coordinates)

    def train_transfer_only(self) -> None:
        self.requires_grad_(False)
        self._cell_map.read.requires_grad_(True)
        self._cell_map.steer.ridge.requires_grad_(True)

    @property
    def _cell_map(self) -> CellMap:
        assert isinstance(self.body, CellMap)  # can_transfer
        return self.body
