"""Norms and inner products of ΔW = s · B A, from the factors: r x r algebra, never a d x d matrix.

Factors are given as (A ``[r, in]``, B ``[out, r]``); everything is computed in float64.
"""

from collections.abc import Iterator, Mapping
from math import sqrt

import torch
from torch import Tensor

from loragen.core.files import natural_key

Factors = tuple[Tensor, Tensor]


def inner(first: Factors, second: Factors) -> float:
    """⟨B₁A₁, B₂A₂⟩ = tr((B₁ᵀB₂)(A₂A₁ᵀ)), the Frobenius inner product."""
    (a1, b1), (a2, b2) = _wide(first), _wide(second)
    return float(torch.sum((b1.T @ b2) * (a1 @ a2.T)))


def norm(factors: Factors) -> float:
    """‖BA‖, Frobenius."""
    return sqrt(max(inner(factors, factors), 0.0))


def distance(first: Factors, second: Factors) -> float:
    """‖B₁A₁ - B₂A₂‖, Frobenius.

    As B₁(A₁ - A₂) + (B₁ - B₂)A₂: two near factorisations differ by little, and the difference of
    two large squares would lose it.
    """
    (a1, b1), (a2, b2) = _wide(first), _wide(second)
    stacked = (torch.cat([a1 - a2, a2]), torch.cat([b1, b1 - b2], dim=1))
    return norm(stacked)


def modules(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Factors]]:
    """(module path, (A, B)) of every linear module with both factors, layer by layer."""
    for key in sorted(tensors, key=natural_key):
        a, b = tensors[key], tensors.get(key.replace(".lora_A.", ".lora_B."))
        if ".lora_A." in key and b is not None and a.ndim == b.ndim == 2:
            yield key.partition(".lora_A.")[0].removeprefix("base_model.model."), (a, b)


def _wide(factors: Factors) -> Factors:
    return factors[0].double(), factors[1].double()
