"""HyperConv: a condition becomes a feature map over the adapter, convolved along each axis."""

from math import prod
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from loragen.core.protocols import TokenGrid


class HyperConv(nn.Module):
    """A hyper-convolutional decoder, after Drag-and-Drop LLMs (arXiv 2506.16406).

    The feature map is ``[batch, H, L, W]``: H layers of the base model, L tokens in each layer,
    W = `hidden_dim` channels. The paper's first axis is the prompts; here these are pooled first,
    so that any number of them will do, and the layers take their place.

    ::

        condition          [B, prompts, positions, dim]   and its mask
        input projection   [B, prompts, positions, 2 hidden] -> mean under the mask -> [B, rank]
        sequence expander  [B, H, L, W]: `rank` coefficients times learned maps
        blocks x N         ConvW (W x W, mixes channels) -> ConvH (kernel along the layers)
                           -> ConvL (kernel along the tokens of a layer), residual, normalised
        output projection  [B, H, L, token_dim] -> [B, tokens, token_dim]

    Parameters: the expander has ``rank · tokens · hidden_dim`` where `max_parameters` allows it
    (linear in the tokens), otherwise ``rank · (tokens / layers + layers) · hidden_dim``: maps
    shared over the layers and scaled per layer, with the largest rank that fits. Each block has
    ``2 · hidden_dim² + 2 · kernel · hidden_dim``, whatever the number of tokens.
    """

    class Config(BaseModel, extra="forbid"):
        blocks: int = Field(3, ge=0, description="Blocks of ConvW -> ConvH -> ConvL.")
        hidden_dim: int = Field(384, ge=1, description="Channels W of the feature map.")
        kernel_size: Literal[1, 3, 5, 7] = Field(
            3, description="Kernel of ConvH (in layers) and ConvL (in tokens)."
        )
        rank: int = Field(
            32, ge=1, description="Coefficients that the condition is condensed to, at most."
        )
        dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the condition.")
        max_parameters: int = Field(
            40_000_000, ge=1, description="Most parameters of the sequence expander."
        )

    def __init__(self, config: Config, condition_dim: int, grid: TokenGrid) -> None:
        super().__init__()
        width = config.hidden_dim
        places, length = token_places(grid)
        layers = int(grid.layer.max()) + 1
        self.read = ConditionReader(condition_dim, 2 * width, config.dropout)
        self.expand = make_expander(config, 2 * width, layers, length)
        self.blocks = nn.ModuleList(
            HyperConvBlock(width, config.kernel_size) for _ in range(config.blocks)
        )
        self.project = nn.Linear(width, grid.token_dim)
        if width == grid.token_dim:
            nn.init.eye_(self.project.weight)  # the map's channels start as the token's values
        # Where each token stands in the map; layers may differ in length, the rest is unused.
        self.register_buffer("place", torch.from_numpy(places), persistent=False)

    def forward(self, condition: Tensor, mask: Tensor) -> Tensor:
        x = self.read(condition, mask)  # (B, 2 hidden)
        x = self.expand(x)  # (B, H, L, W)
        for block in self.blocks:
            x = block(x)  # (B, H, L, W)
        x = self.project(x).flatten(1, 2)  # (B, H * L, token_dim)
        return x[:, self.place]  # (B, tokens, token_dim)


class ConditionReader(nn.Module):
    """A set of prompts -> one vector, whatever their number and order.

    Each prompt is read on its own and the readings are averaged, so that a few prompts that the
    encoder places oddly are outvoted.
    """

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.layers = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden)
        )

    def forward(self, condition: Tensor, mask: Tensor) -> Tensor:
        kept = mask.unsqueeze(-1)  # (B, N, P, 1)
        read = self.layers(self.norm(condition))  # (B, N, P, hidden)
        total = torch.where(kept, read, 0.0).sum(dim=(1, 2))
        return total / kept.sum(dim=(1, 2)).clamp(min=1)  # (B, hidden)


class FullExpander(nn.Module):
    """Coefficients times learned maps ``[rank, H, L, W]``."""

    def __init__(self, hidden: int, rank: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.shape = shape
        self.condense = nn.Linear(hidden, rank)
        self.maps = nn.Parameter(torch.randn(rank, prod(shape)) * rank**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return (self.condense(x) @ self.maps).unflatten(-1, self.shape)


class SharedExpander(nn.Module):
    """Coefficients times maps ``[rank, L, W]`` shared by all layers, scaled by ``[rank, H, W]``."""

    def __init__(self, hidden: int, rank: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        layers, length, width = shape
        self.condense = nn.Linear(hidden, rank)
        self.maps = nn.Parameter(torch.randn(rank, length, width) * rank**-0.5)
        self.scales = nn.Parameter(torch.randn(rank, layers, width))

    def forward(self, x: Tensor) -> Tensor:
        scaled = torch.einsum("br,rhw->brhw", self.condense(x), self.scales)
        return torch.einsum("brhw,rlw->bhlw", scaled, self.maps)


def make_expander(
    config: HyperConv.Config, hidden: int, layers: int, length: int
) -> FullExpander | SharedExpander:
    """The full expander where it fits into `max_parameters`, else the shared one."""
    shape = (layers, length, config.hidden_dim)
    if config.rank * prod(shape) <= config.max_parameters:
        return FullExpander(hidden, config.rank, shape)
    fitting = config.max_parameters // ((layers + length) * config.hidden_dim)
    return SharedExpander(hidden, max(1, min(config.rank * layers, fitting)), shape)


class HyperConvBlock(nn.Module):
    """ConvW -> ConvH -> ConvL on ``[B, H, L, W]``, each mixing the axis it is named after.

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
        y = self.conv_w(self.norm(x))  # (B, H, L, W)
        y = self.act(self.conv_h(y))
        y = self.act(self.conv_l(y))
        return x + self.out(y)


class AxisConv(nn.Module):
    """A depthwise convolution along one axis of ``[B, H, L, W]``, zero beyond the border.

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


def token_places(grid: TokenGrid) -> tuple[np.ndarray, int]:
    """Each token's index in the flattened map ``[H * L]``, and L: the tokens of the longest layer.

    A layer's tokens keep their order, which puts the same matrix of two equal layers at the same
    place.
    """
    counts = np.bincount(grid.layer)
    length = int(counts.max())
    order = np.argsort(grid.layer, kind="stable")
    starts = np.cumsum(counts) - counts
    within = np.empty(grid.tokens, dtype=np.int64)
    within[order] = np.arange(grid.tokens) - np.repeat(starts, counts)
    return grid.layer * length + within, length
