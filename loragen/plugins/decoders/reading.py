"""The reading of prompts that the decoders share."""

import torch
from torch import Tensor, nn


class ConditionReader(nn.Module):
    """Maps a set of prompts to one vector, which does not depend on their order.

    Each prompt is read on its own and the readings are averaged, so that a few unusual prompts have
    little weight. A reading is linear, plus the output of a hidden layer that starts at zero: a new
    prompt is mostly a mixture of prompts seen in training. Where only differences of readings
    count, there is no `bias`, which all readings would share.
    """

    def __init__(self, dim: int, hidden: int, dropout: float, bias: bool = True) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(dim, hidden, bias)
        last = nn.Linear(hidden, hidden, bias)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        self.bend = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), last)

    def forward(self, condition: Tensor, mask: Tensor) -> Tensor:
        kept = mask.unsqueeze(-1)  # (B, prompts, positions, 1)
        condition = self.dropout(condition)
        read = self.linear(condition) + self.bend(condition)  # (B, prompts, positions, hidden)
        total = torch.where(kept, read, 0.0).sum(dim=(1, 2))
        return total / kept.sum(dim=(1, 2)).clamp(min=1)  # (B, hidden)
