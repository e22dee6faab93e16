"""The paper's geometry: a condition grows through feature maps `(N, L, C)` into the token grid.

After Drag-and-Drop LLMs (arXiv 2506.16406, section 2.5): the first map is the encoded prompts (N
prompts, L positions, C dimensions), the last one the tokens of the adapter, each a matrix of L x C.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

Shape = tuple[int, int, int]


class FeatureMaps(nn.Module):
    """``[B, prompts, positions, dim]`` -> ``[B, tokens, token_dim]`` through the given shapes.

    Parameters: each block has ``2 k² (C C' + L L') + k² N N'``, which for the last block grows
    with the tokens; its memory is that of a few maps ``N' L' C'``.
    """

    def __init__(
        self, shapes: Sequence[Shape], condition_dim: int, kernel: int, tokens: int, token_dim: int
    ) -> None:
        """Raises ValueError where the last map has too few values for the tokens."""
        super().__init__()
        last = shapes[-1][0] * shapes[-1][1] * shapes[-1][2]
        if last < tokens * token_dim:
            raise ValueError(
                f"the last map {list(shapes[-1])} has {last:,} values, the adapter needs "
                f"{tokens:,} tokens x {token_dim} = {tokens * token_dim:,}"
            )
        self.tokens, self.token_dim, self.last = tokens, token_dim, last
        self.fit = FitCondition(condition_dim, shapes[0])
        self.blocks = nn.ModuleList(MapBlock(*pair, kernel) for pair in pairwise(shapes))

    def forward(self, condition: Tensor, mask: Tensor) -> Tensor:
        x = self.fit(condition, mask)  # (B, N, L, C) of the first shape
        for index, block in enumerate(self.blocks):
            x = block(x if index == 0 else torch.nn.functional.gelu(x))
        values = x.flatten(1)[:, : self.tokens * self.token_dim]
        return values.unflatten(1, (self.tokens, self.token_dim))

    def choices(self) -> list[str]:
        needed = self.tokens * self.token_dim
        used = f"{needed:,} of the last one's {self.last:,} values ({needed / self.last:.1%})"
        return [f"the maps are as configured (shapes); the tokens are the first {used}"]


class FitCondition(nn.Module):
    """Any number of prompts and positions -> ``[B, N, L, C]``.

    Too few are repeated in turn, too many averaged in turn; what is masked has no part in it.
    """

    def __init__(self, dim: int, shape: Shape) -> None:
        super().__init__()
        self.rows, self.columns, channels = shape
        self.norm = nn.LayerNorm(dim)
        self.project = nn.Linear(dim, channels)
        self.place = nn.Parameter(torch.randn(shape) * 0.02)  # tells repeated ones apart

    def forward(self, condition: Tensor, mask: Tensor) -> Tensor:
        x = torch.where(mask.unsqueeze(-1), condition, 0.0)  # (B, prompts, positions, dim)
        places = dealt(mask, self.columns).to(x), dealt(mask.any(-1), self.rows).to(x)
        x = torch.einsum("bplq,bpqd->bpld", places[0], x)  # (B, prompts, L, dim)
        x = torch.einsum("bnp,bpld->bnld", places[1], x)  # (B, N, L, dim)
        return self.project(self.norm(x)) + self.place


def dealt(mask: Tensor, places: int) -> Tensor:
    """Weights ``[..., places, items]`` that deal the valid items of ``[..., items]`` out to a fixed
    number of places: place i takes the mean of its items, or with fewer items the one whose turn it
    is."""
    order = mask.cumsum(-1) - 1  # (..., items): the how-manyth valid item
    count = mask.sum(-1, keepdim=True).clamp(min=1, max=places)  # (..., 1)
    place = torch.arange(places, device=mask.device) % count  # (..., places)
    takes = (order % places).unsqueeze(-2) == place.unsqueeze(-1)
    takes = takes & mask.unsqueeze(-2)
    return takes.float() / takes.sum(-1, keepdim=True).clamp(min=1)


class MapBlock(nn.Module):
    """One hyper-convolutional block, ``[B, N, L, C]`` -> ``[B, N', L', C']``.

    ::

        w = ConvW2(ConvW1(x))       C, then L as channels
        h = ConvH2(ConvH1(x))       L, then C as channels
        ConvL((w + h + bias) / 3)   N as channels
    """

    def __init__(self, before: Shape, after: Shape, kernel: int) -> None:
        super().__init__()
        (n, rows, width), (n2, rows2, width2) = before, after
        self.norm = nn.LayerNorm((rows, width))
        self.conv_w1 = _conv(width, width2, kernel)
        self.conv_w2 = _conv(rows, rows2, kernel)
        self.conv_h1 = _conv(rows, rows2, kernel)
        self.conv_h2 = _conv(width, width2, kernel)
        self.bias = nn.Parameter(torch.zeros(n, rows2, width2))
        self.conv_l = _conv(n, n2, kernel)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)  # (B, N, L, C)
        w = _along_rows(self.conv_w2, _along_width(self.conv_w1, x))
        h = _along_width(self.conv_h2, _along_rows(self.conv_h1, x))
        mixed: Tensor = self.conv_l((w + h + self.bias) / 3)  # N is the channel axis as it lies
        return mixed


def _conv(channels: int, out: int, kernel: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False)


def _along_width(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """``[B, N, L, C]`` with C as channels over the plane (N, L); channels last needs no copy."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _along_rows(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """``[B, N, L, C]`` with L as channels over the plane (N, C)."""
    return conv(x.transpose(1, 2)).transpose(1, 2)
