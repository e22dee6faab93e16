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
