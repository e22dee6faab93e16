"""HyperConv: a condition becomes a feature map over the adapter, convolved along each axis."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

from loragen.core.protocols import Samples, TokenGrid
from loragen.plugins.decoders._cell_map import CellMap
from loragen.plugins.decoders._directions import coordinates_along
from loragen.plugins.decoders._feature_maps import FeatureMaps


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
