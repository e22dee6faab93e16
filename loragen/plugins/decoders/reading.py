"""What the decoders share: the reading of prompts, and computing on it in full precision."""

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
        self.hidden = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), last)

    def forward(self, condition: Tensor, mask: Tensor) -> Tensor:
        condition = self.dropout(condition)
        read = self.linear(condition) + self.hidden(condition)  # (B, prompts, positions, hidden)
        return mean_over_prompts(read, mask)  # (B, hidden)


def mean_over_prompts(values: Tensor, mask: Tensor) -> Tensor:
    """Returns the mean ``[B, dim]`` of ``[B, prompts, positions, dim]`` over what `mask` keeps."""
    kept = mask.unsqueeze(-1)  # (B, prompts, positions, 1)
    total = torch.where(kept, values, 0.0).sum(dim=(1, 2))
    return total / kept.sum(dim=(1, 2)).clamp(min=1)


def centred(query: Tensor, known: Tensor, left_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Subtracts from readings the mean of the known ones that are not left out.

    Maps ``query [B, F]``, ``known [M, F]`` and ``left_out [B, M]``, all in float32 at least, to the
    centred ``[B, F]`` and ``[B, M, F]``, which is 0 for what is left out, and to ``[B, M]``: 1 for
    what is kept, 0 for what is left out.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, known, kept = query.to(dtype), known.to(dtype), (~left_out).to(dtype)
    centre = kept @ known / kept.sum(1, keepdim=True)  # (B, F)
    return query - centre, (known - centre[:, None]) * kept[..., None], kept


def without_autocast(device: torch.device) -> torch.autocast:
    """Returns a context in which mixed precision is off on the device."""
    known = torch.amp.is_autocast_available(device.type)  # the device "meta" is not
    return torch.autocast(device.type if known else "cpu", enabled=False)
