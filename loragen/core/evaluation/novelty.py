"""How much of a generated adapter is not in the collected ones.

A generator that interpolates returns combinations of what was collected, however far they are from
each single one. What counts as new is therefore the part outside the span of all collected
adapters: once of ΔW = s · B A over all modules, and once of the factors A and B as they are stored.
A blend of factors has no such part, but the products of one adapter's B with another's A give its
ΔW one. As a yardstick, each collected adapter is compared with the span of the others.

With the Gram matrix G of the collected adapters and their inner products c with a generated one x,
the part outside has the squared norm ‖x‖² - cᵀ G⁻¹ c.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from loragen.core.adapter.algebra import inner_products
from loragen.core.adapter.files import Adapter
from loragen.core.analysis.checkpoints import Checkpoint
from loragen.core.evaluation.contestants import EvaluationSetup, draws_of
from loragen.core.evaluation.statistics import novelty_means
from loragen.core.evaluation.targets import Target

KINDS = ("delta_w", "factors")
RIDGE = 1e-12
"""Added to the diagonal of a Gram matrix, in units of its mean: adapters may be equal."""


@dataclass(frozen=True)
class Novelty:
    """Norms of what is outside of a span, as shares of the norms of the adapters."""

    of_targets: Mapping[tuple[str, str], Mapping[str, float]]
    """{`Target.key`: {kind: share}} of the adapter of a dataset's first draw of prompts."""
    of_collected: Mapping[str, float]
    """{kind: share} of a collected adapter outside of the span of the others, on average."""

    def as_dict(self, datasets: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Returns plain data with the mean over each group of the results' datasets."""
        return {"collected": dict(self.of_collected), "groups": novelty_means(datasets)}


def novelty(setup: EvaluationSetup, targets: Sequence[Target]) -> Novelty:
    """Measures one generated adapter of each dataset. The mean adapter belongs to the span."""
    generator = setup.generator
    generated = [
        _Parts(generator.generate(draws_of(target, generator, setup.options)[0]))
        for target in targets
    ]
    count = len(setup.sources) + 1  # with the mean adapter, the last
    gram = {kind: torch.zeros(count, count, dtype=torch.float64) for kind in KINDS}
    with_new = {kind: torch.zeros(count, len(targets), dtype=torch.float64) for kind in KINDS}

    at_once = max(1, setup.adapters_at_once // 2)  # a ΔW is kept as A and B in float64

    def block(first: int) -> list[_Parts]:
        members = range(first, min(first + at_once, count))
        return [
            _Parts(setup.collected(i) if i < count - 1 else setup.mean_adapter()) for i in members
        ]

    for i in range(0, count, at_once):
        rows = block(i)
        for kind in KINDS:
            with_new[kind][i : i + len(rows)] = products(kind, rows, generated)
        for j in range(i, count, at_once):
            columns = rows if i == j else block(j)
            for kind in KINDS:
                found = products(kind, rows, columns)
                gram[kind][i : i + len(rows), j : j + len(columns)] = found
                gram[kind][j : j + len(columns), i : i + len(rows)] = found.T
    shares: dict[str, list[float]] = {}
    collected: dict[str, float] = {}
    for kind in KINDS:
        squares = torch.stack([products(kind, [one], [one])[0, 0] for one in generated])
        shares[kind] = outside(gram[kind], with_new[kind], squares).tolist()
        if count > 2:
            collected[kind] = round(fmean(outside_of_others(gram[kind][:-1, :-1]).tolist()), 6)
    of_targets = {
        target.key: {kind: round(shares[kind][index], 6) for kind in KINDS}
        for index, target in enumerate(targets)
    }
    return Novelty(of_targets, collected)


class _Parts:
    """An adapter as vectors: its ΔW by module, and its tensors."""

    def __init__(self, adapter: Adapter) -> None:
        self.deltas = Checkpoint(adapter.tensors, adapter.config).deltas()
        self.tensors = adapter.tensors


def products(kind: str, first: Sequence[_Parts], second: Sequence[_Parts]) -> Tensor:
    """Returns ``[n, m]`` float64: the inner products of every pair of two lists of adapters."""
    total = torch.zeros(len(first), len(second), dtype=torch.float64)
    if kind == "delta_w":
        for module in first[0].deltas:
            pairs = ([one.deltas[module] for one in several] for several in (first, second))
            total += inner_products(*pairs)
        return total
    for key in first[0].tensors:
        ours, theirs = (
            torch.stack([one.tensors[key].double().flatten() for one in several])
            for several in (first, second)
        )
        total += ours @ theirs.T
    return total


def outside(gram: Tensor, products: Tensor, squares: Tensor) -> Tensor:
    """Returns ``[m]``: the share of the norm of each of m vectors that is outside of the span of n.

    `gram` are the inner products of the n, ``[n, n]``; `products` those of the n with the m,
    ``[n, m]``; `squares` the squared norms of the m.
    """
    inside = (products * torch.linalg.solve(_regular(gram), products)).sum(0)
    found: Tensor = ((squares - inside).clamp(min=0) / squares.clamp(min=1e-300)).sqrt()
    return found


def outside_of_others(gram: Tensor) -> Tensor:
    """Returns ``[n]``: the share of the norm of each of n vectors that is outside of the span of
    the others, 1 / (G⁻¹)_ii being its square."""
    inverse = torch.linalg.inv(_regular(gram)).diagonal()
    found: Tensor = (1 / inverse / gram.diagonal().clamp(min=1e-300)).clamp(0, 1).sqrt()
    return found


def _regular(gram: Tensor) -> Tensor:
    unit = gram.diagonal().mean().clamp(min=1e-300)
    return gram + RIDGE * unit * torch.eye(len(gram), dtype=gram.dtype)
