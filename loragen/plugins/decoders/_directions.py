"""Principal components of adapters that are too large to hold all at once, and where adapters lie
along them."""

import torch
from torch import Tensor

from loragen.core.protocols import Samples

EPSILON = 1e-6
CHUNK = 2**24  # values of all samples at a time: 64 MiB in float32


def principal_directions(samples: Samples, most: int) -> Tensor:
    """At most `most` components as ``[tokens, components, token_dim]``, the strongest first.

    Each is scaled by its standard deviation over the samples: a coefficient of 1 goes as far as
    the samples typically do. Through the samples' inner products (S x S): it holds the answer and
    one chunk, whatever the number of samples. Fewer where the samples span fewer dimensions.
    """
    count, tokens, dim = samples.shape
    step = max(1, CHUNK // (count * dim))
    chunks = [slice(first, first + step) for first in range(0, tokens, step)]
    products = torch.zeros(count, count, dtype=torch.float64)
    for chunk in chunks:
        flat = samples[chunk].flatten(1).double()  # (S, values)
        products += flat @ flat.T
    variance, vectors = torch.linalg.eigh(products)  # ascending
    spans = int((variance > 1e-10 * variance[-1].clamp(min=1e-30)).sum())
    kept = min(most, spans)
    # X = U S V^T: component k is u_k^T X / s_k, and its scale s_k / sqrt(S).
    weights = (vectors[:, -kept:].flip(1) / count**0.5).float() if kept else torch.zeros(count, 0)
    directions = torch.empty(tokens, kept, dim)
    for chunk in chunks:
        directions[chunk] = torch.einsum("sk,std->tkd", weights, samples[chunk])
    return directions


def coordinates_along(directions: Tensor, samples: Samples) -> Tensor:
    """``[S, R]``: the mixture of ``directions [tokens, R, token_dim]`` that is closest to each of
    the samples, on the CPU as they are. It holds the answer and one chunk."""
    count, tokens, dim = samples.shape
    rank = directions.shape[1]
    step = max(1, CHUNK // (count * dim))
    gram = torch.zeros(rank, rank, dtype=torch.float64)
    inner = torch.zeros(rank, count, dtype=torch.float64)
    for first in range(0, tokens, step):
        chunk = slice(first, first + step)
        along = directions[chunk].cpu().transpose(0, 1).flatten(1).double()  # (R, values)
        gram += along @ along.T
        inner += along @ samples[chunk].flatten(1).double().T
    ridge = EPSILON * gram.diagonal().mean() * torch.eye(rank, dtype=torch.float64)
    return torch.linalg.solve(gram + ridge, inner).T.float()
