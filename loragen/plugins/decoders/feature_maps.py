"""The geometry of Drag-and-Drop LLMs (arXiv 2506.16406, section 2.5).

A condition grows through feature maps ``(N, L, C)`` into the token grid: the first map is the
encoded prompts (N prompts, L positions, C dimensions), the last one the tokens of the adapter.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

Shape = tuple[int, int, int]


class FeatureMaps(nn.Module):
    """Maps ``[B, prompts, positions, dim]`` to ``[B, tokens, token_dim]`` through the given shapes.

    Each block has ``2 k² (C C' + L L') + k² N N'`` parameters, which for the last block grow with
    the tokens; its memory is that of a few maps ``N' L' C'``.
    """

    def __init__(
        self, shapes: Sequence[Shape], condition_dim: int, kernel: int, tokens: int, token_dim: int
    ) -> None:
        """Raises ValueError if the last map has fewer values than the tokens."""
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
            x = block(x if index == 0 else nn.functional.gelu(x))
        values = x.flatten(1)[:, : self.tokens * self.token_dim]
        return values.unflatten(1, (self.tokens, self.token_dim))

    def choices(self) -> list[str]:
        needed = self.tokens * self.token_dim
        used = f"{needed:,} of the last map's {self.last:,} values ({needed / self.last:.1%})"
        return [f"the feature maps have the configured shapes; the tokens are the first {used}"]


class FitCondition(nn.Module):
    """Maps any number of prompts and positions to ``[B, N, L, C]``.

    Too few are repeated in turn, too many are averaged in turn; masked ones are ignored.
    """

    def __init__(self, dim: int, shape: Shape) -> None:
        super().__init__()
        self.rows, self.columns, channels = shape
        self.norm = nn.LayerNorm(dim)
        self.project = nn.Linear(dim, channels)
        self.place = nn.Parameter(torch.randn(shape) * 0.02)  # distinguishes repeated prompts

    def forward(self, condition: Tensor, mask: Tensor) -> Tensor:
        x = torch.where(mask.unsqueeze(-1), condition, 0.0)  # (B, prompts, positions, dim)
        columns = round_robin(mask, self.columns).to(x)  # (B, prompts, L, positions)
        rows = round_robin(mask.any(-1), self.rows).to(x)  # (B, N, prompts)
        x = torch.einsum("bplq,bpqd->bpld", columns, x)  # (B, prompts, L, dim)
        x = torch.einsum("bnp,bpld->bnld", rows, x)  # (B, N, L, dim)
        return self.project(self.norm(x)) + self.place


def round_robin(mask: Tensor, slots: int) -> Tensor:
    """Returns averaging weights ``[..., slots, items]`` that distribute valid items over slots.

    `mask` is ``[..., items]`` bool. Slot i averages the items i, i + slots, ...; if there are fewer
    items than slots, slot i has the item ``i mod items``.
    """
    order = mask.cumsum(-1) - 1  # (..., items): index among the valid items
    count = mask.sum(-1, keepdim=True).clamp(min=1, max=slots)  # (..., 1)
    slot = torch.arange(slots, device=mask.device) % count  # (..., slots)
    assigned = (order % slots).unsqueeze(-2) == slot.unsqueeze(-1)
    assigned = assigned & mask.unsqueeze(-2)
    return assigned.float() / assigned.sum(-1, keepdim=True).clamp(min=1)


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

        def conv(channels: int, out: int) -> nn.Conv2d:
            return nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False)

        self.norm = nn.LayerNorm((rows, width))
        self.conv_w1 = conv(width, width2)
        self.conv_w2 = conv(rows, rows2)
        self.conv_h1 = conv(rows, rows2)
        self.conv_h2 = conv(width, width2)
        self.bias = nn.Parameter(torch.zeros(n, rows2, width2))
        self.conv_l = conv(n, n2)

    def forward(self, x: Tensor) -> Tensor:
        def over_width(conv: nn.Conv2d, x: Tensor) -> Tensor:
            """Convolves with C as channels over the plane (N, L), channels last, without a copy."""
            return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

        def over_rows(conv: nn.Conv2d, x: Tensor) -> Tensor:
            """Convolves with L as channels over the plane (N, C)."""
            return conv(x.transpose(1, 2)).transpose(1, 2)

        x = self.norm(x)  # (B, N, L, C)
        w = over_rows(self.conv_w2, over_width(self.conv_w1, x))  # (B, N, L', C')
        h = over_width(self.conv_h2, over_rows(self.conv_h1, x))  # (B, N, L', C')
        mixed: Tensor = self.conv_l((w + h + self.bias) / 3)  # N is the channel axis already
        return mixed
