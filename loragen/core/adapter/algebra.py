"""Algebra of ΔW = B A from its factors: norms, angles, spectra and canonical factors.

Factors are given as (A ``[r, in]``, B ``[out, r]``). Everything is computed in float64 with r x r
matrices; ΔW itself, ``[out, in]``, is never formed.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import nan, sqrt
from typing import Literal

import torch
from torch import Tensor

from loragen.core.adapter.checks import factor_keys, module_of
from loragen.core.files import natural_key

Factors = tuple[Tensor, Tensor]
TargetForm = Literal["raw", "svd"]
"""The factors that a generator learns: as they were trained, or canonical."""


def modules(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Factors]]:
    """Yields (module path, (A, B)) of every module, layer by layer."""
    for key_a, key_b in factor_keys(sorted(tensors, key=natural_key)):
        yield module_of(key_a), (tensors[key_a], tensors[key_b])


# ---------------------------------------------------------------------------- norms and angles


def inner(first: Factors, second: Factors) -> float:
    """Returns the Frobenius inner product, ⟨B₁A₁, B₂A₂⟩ = tr((B₁ᵀB₂)(A₂A₁ᵀ))."""
    (a1, b1), (a2, b2) = _float64(first), _float64(second)
    return float(torch.sum((b1.T @ b2) * (a1 @ a2.T)))


def norm(factors: Factors) -> float:
    """Returns the Frobenius norm, ‖BA‖."""
    return sqrt(max(inner(factors, factors), 0.0))


def distance(first: Factors, second: Factors) -> float:
    """Returns the Frobenius distance, ‖B₁A₁ - B₂A₂‖.

    It is computed as the norm of B₁(A₁ - A₂) + (B₁ - B₂)A₂, because the small difference of two
    near factorisations would be lost by cancellation in a difference of two large squares.
    """
    (a1, b1), (a2, b2) = _float64(first), _float64(second)
    return norm((torch.cat([a1 - a2, a2]), torch.cat([b1, b1 - b2], dim=1)))


def inner_products(first: Sequence[Factors], second: Sequence[Factors]) -> Tensor:
    """Returns ``[n, m]`` float64: `inner` of every pair of two lists of factors of one module.

    All ``A`` of a list are stacked to ``[n·r, in]`` (and all ``B`` to ``[out, n·r]``), so that two
    matrix products do the work of n·m pairs; the ranks may differ from pair to pair.
    """

    def stacked(several: Sequence[Factors]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns all A ``[sum of ranks, in]``, all B ``[out, sum of ranks]``, and the index of
        the factors to which each rank-1 component belongs, ``[sum of ranks]``."""
        wide = [_float64(factors) for factors in several]
        owners = torch.tensor([i for i, (a, _) in enumerate(wide) for _ in range(a.shape[0])])
        return torch.cat([a for a, _ in wide]), torch.cat([b for _, b in wide], dim=1), owners

    (a1, b1, owners1), (a2, b2, owners2) = stacked(first), stacked(second)
    products = (b1.T @ b2) * (a1 @ a2.T)  # (sum of ranks, sum of ranks)
    rows = products.new_zeros(len(first), len(owners2)).index_add_(0, owners1, products)
    return products.new_zeros(len(first), len(second)).index_add_(1, owners2, rows)


# ---------------------------------------------------------------------------- spectra


def singular_values(factors: Factors) -> Tensor:
    """Returns the first min(r, in, out) singular values of BA, float64, descending; the others are
    zero. They are NaN if a factor is not finite.

    With B = Q_B R_B and Aᵀ = Q_A R_A, BA = Q_B (R_B R_Aᵀ) Q_Aᵀ has the singular values of R_B R_Aᵀ.
    """
    a, b = _float64(factors)
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        return torch.full((min(a.shape[0], a.shape[1], b.shape[0]),), nan, dtype=torch.float64)
    r_a, r_b = torch.linalg.qr(a.T).R, torch.linalg.qr(b).R  # 'reduced': at most r rows
    values: Tensor = torch.linalg.svdvals(r_b @ r_a.T)
    return values


def stable_rank(values: Tensor) -> float:
    """Returns ‖ΔW‖² / σ₁² from the singular values: between 1 and the rank, hardly moved by small
    ones; 0 if all are zero.

    Rudelson & Vershynin 2007, "Sampling from large matrices".
    """
    largest = float(values.max())
    return 0.0 if largest == 0 else float((values / largest).square().sum())


def effective_rank(values: Tensor) -> float:
    """Returns the exponential of the entropy of σ / Σσ, which is the number of equal singular
    values that have the same entropy; 0 if all are zero.

    Roy & Vetterli 2007, "The effective rank: a measure of effective dimensionality".
    """
    total = float(values.sum())
    return 0.0 if total == 0 else float(torch.special.entr(values / total).sum().exp())


# ---------------------------------------------------------------------------- canonical factors


def in_form(tensors: Mapping[str, Tensor], form: TargetForm) -> dict[str, Tensor]:
    """Returns the tensors of an adapter in the form that a generator learns.

    `raw` keeps them. `svd` replaces the factors of every module by their `canonical` ones and keeps
    the other tensors. Because B A = (B Q)(Q⁻¹ A) for any invertible Q, only adapters that were
    trained from the same initial weights are comparable without a canonical form.
    """
    found = dict(tensors)
    if form == "svd":
        for key_a, key_b in factor_keys(tensors):
            found[key_a], found[key_b] = canonical(tensors[key_a], tensors[key_b])
    return found


def canonical(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Returns √S Vᵀ ``[r, in]`` and U √S ``[out, r]`` of B A = U S Vᵀ, in the dtypes of A and B.

    Singular values descend, and the largest value of each row of A is positive: if the singular
    values are distinct, equal products give equal factors. With B = Q_B R_B and Aᵀ = Q_A R_A, the
    SVD is that of the r x r matrix R_B R_Aᵀ between Q_B and Q_A.
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


def _float64(factors: Factors) -> Factors:
    return factors[0].double(), factors[1].double()
