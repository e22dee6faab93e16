"""HyperConv: a condition becomes a feature map over the adapter, convolved along each axis.

After Drag-and-Drop LLMs (arXiv 2506.16406, section 2.5); `feature_maps` has that paper's geometry.
The derived geometry here is a map with one cell for each matrix of each layer; each cell holds the
coefficients of directions of weight space, which start as the principal components of the
collected adapters.
"""

from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

from loragen.core.protocols import Samples, TokenGrid
from loragen.plugins.decoders.feature_maps import FeatureMaps
from loragen.plugins.decoders.reading import ConditionReader

MIN_DIRECTIONS, MAX_DIRECTIONS = 4, 32
CHUNK = 2**24  # values of all samples at a time: 64 MiB in float32


class HyperConv(nn.Module):
    """A hyper-convolutional decoder, after Drag-and-Drop LLMs (arXiv 2506.16406).

    With `shapes` it has the paper's geometry (`FeatureMaps`). Without, the feature map
    ``(N, L, C)`` covers the adapter cell by cell: N layers of the base model, L kinds of matrix in
    a layer (q_proj's lora_A, ...), C channels. It computes, for each cell, the coefficients of R
    directions of weight space::

        read      [B, prompts, positions, dim] -> each prompt on its own, averaged -> [B, hidden]
        expand    [B, N, L, C]   the condition, plus a learned vector of each cell
        blocks    [B, N, L, C]   ConvW (mixes channels) -> ConvH (along the layers) -> ConvL (along
                                 the kinds), residual, normalised
        steer     [B, N, L, R]   coefficients: common to all cells, plus each cell's correction
        project   [B, tokens, token_dim]   sum over the directions of a cell's tokens

    The directions start as the principal components of the collected adapters (`start_from`), so
    training begins with a linear model of the collection. The directions have
    ``R · tokens · token_dim`` parameters; `rank: auto` uses as many directions as `max_parameters`
    allows, between 4 and 32. The other parameters are a few million for any adapter.
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
        """Raises ValueError if the last of `shapes` has too few values."""
        super().__init__()
        self.body: FeatureMaps | CellMap
        if config.shapes:
            self.body = FeatureMaps(
                config.shapes, condition_dim, config.kernel_size, grid.tokens, grid.token_dim
            )
        else:
            self.body = CellMap(config, condition_dim, grid)

    def forward(self, condition: Tensor, mask: Tensor) -> Tensor:
        return self.body(condition, mask)

    def choices(self) -> list[str]:
        return self.body.choices()

    @torch.no_grad()
    def start_from(self, samples: Samples) -> None:
        """Sets the directions to the samples' principal components; the others stay small."""
        if isinstance(self.body, CellMap):
            directions = self.body.project.directions
            found = principal_directions(samples, directions.shape[1])  # (tokens, R', token_dim)
            directions.mul_(0.1)
            directions[:, : found.shape[1]] = found


class CellMap(nn.Module):
    """The derived geometry: a map over the cells, whose channels give the coefficients."""

    def __init__(self, config: HyperConv.Config, condition_dim: int, grid: TokenGrid) -> None:
        super().__init__()
        self.config, width = config, config.hidden_dim
        cell, shape = cells_of(grid)
        if config.rank != "auto":
            num_directions = config.rank
        else:
            allowed = config.max_parameters // (grid.tokens * grid.token_dim)
            num_directions = min(max(allowed, MIN_DIRECTIONS), MAX_DIRECTIONS)
        self.read = ConditionReader(condition_dim, 2 * width, config.dropout)
        self.expand = Expander(2 * width, (*shape, width))
        self.blocks = nn.ModuleList(
            HyperConvBlock(width, config.kernel_size) for _ in range(config.blocks)
        )
        self.steer = Steering(2 * width, width, num_directions)
        self.project = Directions(num_directions, cell, grid, config.train_directions)

    def forward(self, condition: Tensor, mask: Tensor) -> Tensor:
        read = self.read(condition, mask)  # (B, 2 C)
        x = self.expand(read)  # (B, N, L, C)
        for block in self.blocks:
            x = block(x)  # (B, N, L, C)
        coefficients = self.steer(read, x)  # (B, N, L, R)
        return self.project(coefficients)  # (B, tokens, token_dim)

    def choices(self) -> list[str]:
        layers, kinds, width = self.expand.place.shape
        tokens, num_directions, dim = self.project.directions.shape
        why = "as configured (rank)"
        if self.config.rank == "auto":
            limits = f"{MIN_DIRECTIONS} to {MAX_DIRECTIONS}"
            most = self.config.max_parameters
            why = f"max_parameters {most:,} over that, within {limits} (rank: auto)"
        then = "train (train_directions)"
        if not self.config.train_directions:
            then = "stay fixed (train_directions: false)"
        size = f"{layers} layers x {kinds} kinds of matrix x {width} channels"
        return [
            f"feature map: {size}, from the adapter and hidden_dim",
            f"{num_directions} directions of {tokens * dim:,} values: {why}",
            f"the directions start as the principal components of the checkpoints and {then}",
        ]


class Expander(nn.Module):
    """Maps a vector to every cell of the map ``(N, L, C)``, plus a learned vector of the cell."""

    def __init__(self, hidden: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.spread = nn.Linear(hidden, shape[2])
        self.place = nn.Parameter(torch.randn(shape) * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.spread(x)[:, None, None] + self.place  # (B, N, L, C)


class HyperConvBlock(nn.Module):
    """ConvW -> ConvH -> ConvL on ``[B, N, L, C]``, each mixing the axis it is named after.

    It starts as the identity, because the last layer is initialised to zero.
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

    It computes shifted multiply-adds, which with channels last need no transpose and are faster on
    a CPU than a grouped convolution.
    """

    def __init__(self, width: int, kernel: int, axis: int) -> None:
        super().__init__()
        self.axis, self.reach = axis, kernel // 2
        self.weight = nn.Parameter(torch.randn(2 * self.reach + 1, width) * kernel**-0.5)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        size, outer = x.shape[self.axis], [0, 0] * (3 - self.axis)
        y = x * self.weight[self.reach] + self.bias
        for shift in range(1, min(self.reach, size - 1) + 1):
            ahead = x.narrow(self.axis, shift, size - shift) * self.weight[self.reach + shift]
            behind = x.narrow(self.axis, 0, size - shift) * self.weight[self.reach - shift]
            y = y + nn.functional.pad(ahead, [*outer, 0, shift])
            y = y + nn.functional.pad(behind, [*outer, shift, 0])
        return y


class Steering(nn.Module):
    """The coefficients of the directions: common to all cells at first, then corrected by cell."""

    def __init__(self, hidden: int, width: int, num_directions: int) -> None:
        super().__init__()
        self.common = nn.Linear(hidden, num_directions)
        self.norm = nn.LayerNorm(width)
        self.correct = nn.Linear(width, num_directions)
        nn.init.zeros_(self.correct.weight)
        nn.init.zeros_(self.correct.bias)

    def forward(self, read: Tensor, x: Tensor) -> Tensor:
        return self.common(read)[:, None, None] + self.correct(self.norm(x))  # (B, N, L, R)


class Directions(nn.Module):
    """Multiplies coefficients ``[B, N, L, R]`` by the directions of each token, ``[tokens, R,
    token_dim]``."""

    cell: Tensor

    def __init__(
        self, num_directions: int, cell: np.ndarray, grid: TokenGrid, trained: bool
    ) -> None:
        super().__init__()
        start = torch.randn(grid.tokens, num_directions, grid.token_dim) * num_directions**-0.5
        self.directions = nn.Parameter(start, requires_grad=trained)
        self.register_buffer("cell", torch.from_numpy(cell), persistent=False)

    def forward(self, coefficients: Tensor) -> Tensor:
        of_token = coefficients.flatten(1, 2)[:, self.cell]  # (B, tokens, R)
        tokens = torch.bmm(of_token.transpose(0, 1), self.directions)  # (tokens, B, token_dim)
        return tokens.transpose(0, 1)


def cells_of(grid: TokenGrid) -> tuple[np.ndarray, tuple[int, int]]:
    """Returns each token's cell in the flattened map, ``[tokens]``, and the map's (layers, kinds).

    A kind is a matrix of a module, the same in every layer.
    """
    matrices = int(grid.matrix.max()) + 1
    kind = np.unique(grid.module * matrices + grid.matrix, return_inverse=True)[1]
    kinds = int(kind.max()) + 1
    return grid.layer * kinds + kind, (int(grid.layer.max()) + 1, kinds)


def principal_directions(samples: Samples, most: int) -> Tensor:
    """Returns at most `most` principal components, ``[tokens, components, token_dim]``.

    They are sorted by variance, the largest first, and scaled by their standard deviation over the
    samples, so that a coefficient of 1 is a typical distance. They are computed from the samples'
    inner products (S x S), with the result and one chunk in memory. There are fewer components if
    the samples span fewer dimensions.
    """
    count, tokens, dim = samples.shape
    step = max(1, CHUNK // (count * dim))
    chunks = [slice(first, first + step) for first in range(0, tokens, step)]
    products = torch.zeros(count, count, dtype=torch.float64)
    for chunk in chunks:
        flat = samples[chunk].flatten(1).double()  # (S, values)
        products += flat @ flat.T
    variance, vectors = torch.linalg.eigh(products)  # ascending
    spanned = int((variance > 1e-10 * variance[-1].clamp(min=1e-30)).sum())
    kept = min(most, spanned)
    # X = U S V^T: component k is u_k^T X / s_k, and its scale s_k / sqrt(S).
    weights = (vectors[:, -kept:].flip(1) / count**0.5).float() if kept else torch.zeros(count, 0)
    directions = torch.empty(tokens, kept, dim)
    for chunk in chunks:
        directions[chunk] = torch.einsum("sk,std->tkd", weights, samples[chunk])
    return directions
