"""A decoder of the mean of the prompts, a small MLP, and a low-rank map that all tokens share."""

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from loragen.core.protocols import TokenGrid


class MeanMLP(nn.Module):
    """Every token is a learned mixture of `rank` directions that the prompts choose.

    The output layer maps to `rank * token_dim` values whatever the size of the adapter; a token
    adds only `rank` weights, and starts from the sum of embeddings of its layer, module and matrix.
    """

    class Config(BaseModel, extra="forbid"):
        hidden_dim: int = Field(256, ge=1, description="Width of the MLP (values).")
        rank: int = Field(16, ge=1, description="Directions that the tokens share.")

    def __init__(self, config: Config, condition_dim: int, grid: TokenGrid) -> None:
        super().__init__()
        self.rank, self.token_dim = config.rank, grid.token_dim
        self.mlp = nn.Sequential(
            nn.LayerNorm(condition_dim),
            nn.Linear(condition_dim, config.hidden_dim),
            nn.GELU(),
            nn.Linear(config.hidden_dim, config.rank * grid.token_dim),
        )
        self.mixture = nn.Parameter(torch.randn(grid.tokens, config.rank) / config.rank**0.5)
        self.places = nn.ModuleList(
            nn.Embedding(int(index.max()) + 1, grid.token_dim)
            for index in (grid.layer, grid.module, grid.matrix)
        )
        for name in ("layer", "module", "matrix"):
            # The index is derived from the grid, so it is not saved with the weights.
            index = torch.from_numpy(getattr(grid, name))
            self.register_buffer(f"{name}_index", index, persistent=False)

    def forward(self, condition: Tensor, mask: Tensor) -> Tensor:
        directions = self.mlp(masked_mean(condition, mask))  # (B, R * D)
        directions = directions.view(-1, self.rank, self.token_dim)  # (B, R, D)
        tokens: Tensor = self.mixture @ directions + self._start()  # (B, T, D)
        return tokens

    def _start(self) -> Tensor:
        indices = (self.layer_index, self.module_index, self.matrix_index)
        return torch.stack(
            [embed(index) for embed, index in zip(self.places, indices, strict=True)]
        ).sum(0)  # (T, D)


def masked_mean(condition: Tensor, mask: Tensor) -> Tensor:
    """Returns the mean over unmasked positions: `(B, P, L, C)` and `(B, P, L)` to `(B, C)`.

    `torch.where`, unlike a product, ignores masked values even if they are NaN.
    """
    kept = mask[..., None]
    total = torch.where(kept, condition, 0.0).sum(dim=(1, 2))
    return total / kept.sum(dim=(1, 2)).clamp(min=1)
