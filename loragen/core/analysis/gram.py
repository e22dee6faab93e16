"""Checkpoints compared each with each: inner products of ΔW, cosines, principal components.

Exact, for a bounded sample: inner products come from the factors, and everything else from them.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from loragen.core.adapter.algebra import inner_products, modules
from loragen.core.analysis.checkpoints import read_checkpoint
from loragen.core.analysis.report import ComparedCheckpoints, Trajectory

MOST_CHECKPOINTS = 50
"""Of a sample: its inner products are 1,275, however many files there are."""
HELD_BYTES = 2**30
"""Of checkpoints held at a time. Two blocks of checkpoints that fit are multiplied with each other,
so that a sample of any size is compared in this memory; larger adapters are only read more often.
"""
MOST_AXES = 3
RESOLUTION = 1e-12
"""Share of Σ‖ΔW‖² below which the variance is rounding: cosines cannot tell such ΔW apart."""

Scaled = dict[str, tuple[Tensor, Tensor, float]]
"""Module -> (A, B, scaling), as the file has them: half the memory of float64, or less."""


def evenly(files: Sequence[Path], most: int) -> list[Path]:
    """At most so many, evenly spaced, the first and the last among them; of one, the last."""
    if len(files) <= most:
        return list(files)
    if most == 1:
        return [files[-1]]
    return [files[round(i * (len(files) - 1) / (most - 1))] for i in range(most)]


def sampled(files: Sequence[Path]) -> ComparedCheckpoints | None:
    """None for fewer than two files, which there is nothing to compare in."""
    chosen = evenly(files, MOST_CHECKPOINTS)
    if len(chosen) < 2:
        return None
    products = gram(chosen)
    return ComparedCheckpoints(
        [file.name for file in chosen], cosine(products).tolist(), trajectory(products)
    )


def gram(files: Sequence[Path]) -> Tensor:
    """``[n, n]`` float64: ⟨ΔWᵢ, ΔWⱼ⟩ over all modules. The files have the same modules and sizes;
    ranks and scalings may differ."""
    result = torch.empty(len(files), len(files), dtype=torch.float64)
    blocks = list(_blocks(files))
    for rows in blocks:
        held = [_read(files[i]) for i in rows]
        for columns in blocks:
            if columns.start > rows.start:
                break
            others = held if columns == rows else [_read(files[j]) for j in columns]
            products = _products(held, others)
            result[rows.start : rows.stop, columns.start : columns.stop] = products
            result[columns.start : columns.stop, rows.start : rows.stop] = products.T
    return result


def cosine(products: Tensor) -> Tensor:
    """``[n, n]`` from the inner products; NaN where a ΔW is zero."""
    norms = products.diagonal().clamp(min=0).sqrt()
    return (products / torch.outer(norms, norms)).clamp(-1, 1)


def trajectory(products: Tensor) -> Trajectory | None:
    """Classical PCA from the inner products, doubly centred: with H = 1 - 11ᵀ/n, the eigenvectors
    of H G H are the coordinates (over √λ) of the centred ΔW on their principal axes.

    An axis points from the first towards the last. None where all are equal within rounding.
    """
    centred = products - products.mean(0) - products.mean(1, keepdim=True) + products.mean()
    values, vectors = torch.linalg.eigh((centred + centred.T) / 2)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    if values.sum() <= RESOLUTION * products.trace():
        return None
    axes = min(MOST_AXES, len(products) - 1)
    coordinates = vectors[:, :axes] * values[:axes].sqrt()
    backwards = coordinates[-1] < coordinates[0]
    coordinates = torch.where(backwards, -coordinates, coordinates)
    return Trajectory((values[:axes] / values.sum()).tolist(), coordinates.tolist())


def _blocks(files: Sequence[Path]) -> Iterator[range]:
    """Ranges of files of which two fit into `HELD_BYTES`."""
    one = sum(a.nbytes + b.nbytes for a, b, _ in _read(files[0]).values())
    size = max(1, HELD_BYTES // (2 * max(one, 1)))
    for start in range(0, len(files), size):
        yield range(start, min(start + size, len(files)))


def _products(one: Sequence[Scaled], other: Sequence[Scaled]) -> Tensor:
    """``[n, m]``: module by module, so that only one is widened to float64 at a time."""
    total = torch.zeros(len(one), len(other), dtype=torch.float64)
    for module in one[0]:
        rows, columns = [held[module] for held in one], [held[module] for held in other]
        scalings = torch.outer(*(_scalings(several) for several in (rows, columns)))
        total += scalings * inner_products([r[:2] for r in rows], [c[:2] for c in columns])
    return total


def _scalings(several: Sequence[tuple[Tensor, Tensor, float]]) -> Tensor:
    return torch.tensor([scaling for _, _, scaling in several], dtype=torch.float64)


def _read(file: Path) -> Scaled:
    checkpoint = read_checkpoint(file)
    factors = modules(checkpoint.tensors)
    return {name: (a, b, checkpoint.scaling(name)) for name, (a, b) in factors}
