"""Is what was generated new? Its distance from every training checkpoint, and from their mean.

A generator that only remembers would write one of the checkpoints it has seen; one that ignores
its prompts, their mean. Both distances are between ΔW = s · B A, over all modules, and are told
beside the spread inside a dataset: how far checkpoints of one training run are from their own mean.
Checkpoints are read one at a time, twice; memory does not grow with their number.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, sqrt
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from loragen.core.adapters import Adapter
from loragen.core.analysis.places import Checkpoint, read_checkpoint
from loragen.core.evaluation.bench import Bench
from loragen.core.evaluation.targets import Target
from loragen.core.lora_algebra import Factors, distance, inner, inner_products

Deltas = dict[str, Factors]
"""Module -> (A, s·B)"""


@dataclass(frozen=True)
class Novelty:
    """Of the adapter generated from a dataset's first draw of prompts; distances of ΔW."""

    target: Target
    to_nearest: float
    nearest: str
    """`dataset/checkpoint` of the nearest training checkpoint."""
    to_mean: float
    """To the mean adapter, of all training checkpoints."""


@dataclass(frozen=True)
class Spread:
    novelties: list[Novelty]
    within: float
    """Mean distance of a training checkpoint to the (element-wise) mean of its dataset."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data: the mean over each group."""
        groups: dict[str, dict[str, float]] = {}
        for group in dict.fromkeys(one.target.group for one in self.novelties):
            members = [one for one in self.novelties if one.target.group == group]
            groups[group] = {
                "to_nearest": fmean(one.to_nearest for one in members),
                "to_mean": fmean(one.to_mean for one in members),
            }
        return {"within_a_dataset": self.within, "groups": groups}


def novelty(bench: Bench, targets: Sequence[Target]) -> Spread:
    """How far the generated adapters are from everything seen in training."""
    gallery = Gallery([bench.generator.generate(bench.draws(target)[0]) for target in targets])
    nearest: list[tuple[float, str]] = [(inf, "")] * len(targets)
    within = []
    for source in bench.sources:
        mean, apart = _mean(source.checkpoints), []
        for file in source.checkpoints:
            deltas = read_checkpoint(file).deltas()
            apart.append(_distance(deltas, mean))
            found = [(far, f"{source.name}/{file.stem}") for far in gallery.distances(deltas)]
            nearest = list(map(min, nearest, found))
        within.append(fmean(apart))
    to_mean = gallery.distances(_deltas(bench.mean_adapter()))
    return Spread(
        [
            Novelty(target, near, label, far)
            for target, (near, label), far in zip(targets, nearest, to_mean, strict=True)
        ],
        fmean(within),
    )


class Gallery:
    """Adapters of one shape, whose distances to another are computed in one go."""

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self.adapters = [_deltas(adapter) for adapter in adapters]
        squares = [_square(deltas) for deltas in self.adapters]
        self.squares = torch.tensor(squares, dtype=torch.float64)

    def distances(self, deltas: Deltas) -> list[float]:
        """‖ΔW - ΔW′‖ of each adapter, by ‖ΔW‖² + ‖ΔW′‖² - 2 ⟨ΔW, ΔW′⟩ in float64."""
        products = torch.zeros(len(self.adapters), dtype=torch.float64)
        for module, factors in deltas.items():
            ours = [adapter[module] for adapter in self.adapters]
            products += inner_products(ours, [factors]).squeeze(1)
        squares: Tensor = self.squares + _square(deltas) - 2 * products
        return list(squares.clamp(min=0).sqrt().tolist())


def _deltas(adapter: Adapter) -> Deltas:
    return Checkpoint(adapter.tensors, adapter.config).deltas()


def _mean(checkpoints: Sequence[Path]) -> Deltas:
    """Of the factors, element by element, in float64."""
    total: Deltas = {}
    for file in checkpoints:
        for module, (a, b) in read_checkpoint(file).deltas().items():
            a, b = a.double() / len(checkpoints), b / len(checkpoints)
            before = total.get(module)
            total[module] = (before[0] + a, before[1] + b) if before else (a, b)
    return total


def _distance(one: Deltas, other: Deltas) -> float:
    return sqrt(sum(distance(factors, other[module]) ** 2 for module, factors in one.items()))


def _square(deltas: Deltas) -> float:
    return sum(inner(factors, factors) for factors in deltas.values())
