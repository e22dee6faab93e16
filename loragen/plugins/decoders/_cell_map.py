"""The derived geometry: a feature map over the adapter, cell by cell, that steers directions."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from loragen.core.protocols import Samples, TokenGrid
from loragen.plugins.decoders._directions import principal_directions
from loragen.plugins.decoders._transfer import Ridge, with_constant

if TYPE_CHECKING:
    from loragen.plugins.decoders.hyperconv import HyperConv

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
