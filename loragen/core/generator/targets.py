"""In which of its many factorisations a LoRA is learned.

B A = (B Q)(Q⁻¹ A) for any invertible Q. Adapters that started from the same weights keep close to
each other as they are; adapters of many origins are comparable in a canonical form only.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from loragen.core.lora_algebra import modules

TargetForm = Literal["raw", "svd"]


def in_form(tensors: Mapping[str, Tensor], form: TargetForm) -> dict[str, Tensor]:
    """`raw`: as they are. `svd`: every module's A and B replaced by those of `canonical`, tensors
    that are no such pair kept."""
    found = dict(tensors)
    if form == "raw":
        return found
    keys = {key.partition(".lora_A.")[0].removeprefix("base_model.model."): key for key in tensors}
    for name, (a, b) in modules(tensors):
        key = keys[name]
        found[key], found[key.replace(".lora_A.", ".lora_B.")] = canonical(a, b)
    return found


def canonical(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A ``[r, in]`` and B ``[out, r]`` -> √S Vᵀ and U √S of B A = U S Vᵀ, in their own dtypes.

    Singular values descend, and the largest value of each row of A is positive: equal products give
    equal factors, where the singular values differ. In r x r algebra: with B = Q_B R_B and
    Aᵀ = Q_A R_A, the SVD is that of R_B R_Aᵀ between Q_B and Q_A.
    """
    q_b, r_b = torch.linalg.qr(b.double())  # (out, k), (k, r)
    q_a, r_a = torch.linalg.qr(a.double().T)  # (in, k'), (k', r)
    u, s, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = torch.zeros(a.shape[0], dtype=torch.float64)
    rank = min(len(s), len(root))
    root[:rank] = s[:rank].sqrt()
    new_a = torch.zeros_like(a, dtype=torch.float64)
    new_b = torch.zeros_like(b, dtype=torch.float64)
    new_a[:rank] = root[:rank, None] * (vt[:rank] @ q_a.T)
    new_b[:, :rank] = (q_b @ u[:, :rank]) * root[:rank]
    largest = new_a.gather(1, new_a.abs().argmax(dim=1, keepdim=True))  # (r, 1)
    sign = torch.where(largest < 0, -1.0, 1.0)
    return (new_a * sign).to(a.dtype), (new_b * sign.T).to(b.dtype)
