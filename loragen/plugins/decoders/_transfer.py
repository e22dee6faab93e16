"""From the features of some datasets to their coordinates, by ridge regression."""

import math

import torch
from torch import Tensor, nn

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
        with torch.autocast(known.device.type, enabled=False):  # solving needs float32
            x = with_constant(known.float())  # (D, F + 1)
            kernel = x @ x.T / self.features
            penalty = self.log_penalty.exp() * torch.eye(len(x), device=x.device)
            solved = torch.linalg.solve(kernel + penalty, coordinates.float())  # (D, R)
            return x.T @ solved / self.features


def with_constant(features: Tensor) -> Tensor:
    return torch.cat([features, features.new_ones(len(features), 1)], dim=1)
