"""Is what was generated new? Its distance from every training checkpoint, and from their mean.

A generator that only remembers would write one of the checkpoints it has seen; one that ignores
its prompts, their mean. Both distances are between ΔW = s · B A over all modules, and are told
beside the spread inside a dataset: how far checkpoints of one training run are from their own mean.
Checkpoints are read one at a time, twice; memory does not grow with their number.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, sqrt
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from loragen.core.adapters import scaling
from loragen.core.analysis.lora_algebra import Factors, distance, modules
from loragen.core.checkpoints import read_tensors
from loragen.core.evaluation.bench import Bench
from loragen.core.evaluation.targets import Target
from loragen.core.generator.sources import Source


@dataclass(frozen=True)
class Novelty:
    """Of the adapter generated from a dataset's first draw of prompts; distances of ΔW."""

    to_nearest: float
    nearest: str
    """`dataset/checkpoint` of the nearest training checkpoint."""
    to_mean: float
    """To the mean adapter, of all training checkpoints."""


@dataclass(frozen=True)
class Spread:
    novelties: dict[tuple[str, str], Novelty]
    """By `Target.key`."""
    within: float
    """Mean distance of a training checkpoint to the (element-wise) mean of its dataset."""


def novelty(bench: Bench, targets: Sequence[Target]) -> Spread:
    """How far the generated adapters are from everything seen in training."""
    made = [bench.generator.generate(bench.draws(target)[0]).tensors for target in targets]
    gallery, scale = Gallery(made), scaling(bench.generator.adapter_config)
    nearest: list[tuple[float, str]] = [(inf, "")] * len(made)
    within = []
    for source in bench.sources:
        mean, spread = _mean(source.checkpoints), []
        for file in source.checkpoints:
            tensors = read_tensors(file)
            spread.append(_apart(tensors, mean))
            found = gallery.distances(tensors).tolist()
            label = f"{source.name}/{file.stem}"
            nearest = [min(best, (d, label)) for best, d in zip(nearest, found, strict=True)]
        within.append(fmean(spread))
    to_mean = gallery.distances(bench.mean_adapter().tensors).tolist()
    novelties = {
        target.key: Novelty(scale * near, label, scale * far)
        for target, (near, label), far in zip(targets, nearest, to_mean, strict=True)
    }
    return Spread(novelties, scale * fmean(within))


class Gallery:
    """Adapters of one shape, laid side by side: their distances to another in one go."""

    def __init__(self, adapters: Sequence[Mapping[str, Tensor]]) -> None:
        self.count = len(adapters)
        together = [dict(modules(tensors)) for tensors in adapters]
        self.modules: dict[str, Factors] = {}
        for name in together[0]:
            factors = [one[name] for one in together]
            # A: (count · r, in), B: (out, count · r)
            a = torch.cat([a.double() for a, _ in factors])
            self.modules[name] = a, torch.cat([b.double() for _, b in factors], dim=1)
        self.squares = torch.stack([self._inner(one)[i] for i, one in enumerate(together)])

    def distances(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """``[count]`` float64: ‖ΔW - ΔW′‖ of each adapter and the one given, for s = 1."""
        factors = dict(modules(tensors))
        square = sum(float(torch.sum((b.T @ b) * (a @ a.T))) for a, b in map(_wide, factors.values()))
        return (self.squares + square - 2 * self._inner(factors)).clamp(min=0).sqrt()

    def _inner(self, factors: Mapping[str, Factors]) -> Tensor:
        """``[count]``: ⟨BA, B′A′⟩ = tr((BᵀB′)(A′Aᵀ)) with each adapter, over all modules."""
        total = torch.zeros(self.count, dtype=torch.float64)
        for name, (all_a, all_b) in self.modules.items():
            a, b = _wide(factors[name])
            products = (b.T @ all_b) * (a @ all_a.T)  # (r, count · r)
            total += products.view(len(a), self.count, -1).sum(dim=(0, 2))
        return total


def _mean(checkpoints: Sequence[Path]) -> dict[str, Tensor]:
    """The element-wise mean of a dataset's checkpoints, in float64."""
    total: dict[str, Tensor] = {}
    for file in checkpoints:
        for key, tensor in read_tensors(file).items():
            part = tensor.double() / len(checkpoints)
            total[key] = total[key].add_(part) if key in total else part
    return total


def _apart(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float:
    known = dict(modules(others))
    return sqrt(sum(distance(factors, known[name]) ** 2 for name, factors in modules(tensors)))


def _wide(factors: Factors) -> Factors:
    return factors[0].double(), factors[1].double()


def as_dict(spread: Spread, targets: Sequence[Target]) -> dict[str, Any]:
    """Plain data: for each dataset, and the mean over each group."""
    groups = dict.fromkeys(target.group for target in targets)
    return {
        "spread_within_a_dataset": spread.within,
        "groups": {
            group: {
                measure: fmean(
                    getattr(one, measure) for (of, _), one in spread.novelties.items() if of == group
                )
                for measure in ("to_nearest", "to_mean")
            }
            for group in groups
        },
    }
