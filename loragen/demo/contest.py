"""The contest: for every target, the generated adapter beside everything simpler."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from random import Random
from statistics import fmean, pstdev
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loragen.core.adapters import Adapter, attach_adapter, read_adapter, swap_adapter
from loragen.core.base_models import BaseModel
from loragen.core.data.prompts import read_prompts
from loragen.core.data.rows import Row, read_rows
from loragen.core.generator.infer import infer
from loragen.core.generator.model import Generator
from loragen.core.lora.evaluate import evaluate
from loragen.core.protocols import Encoder
from loragen.core.runs import LoraManifest, read_manifest
from loragen.demo.settings import PROMPTS
from loragen.demo.world import Pair

COLUMNS = (
    "base",
    "mean_adapter",
    "nearest_adapter",
    "multi_task",
    "random_prompts",
    "generated",
    "oracle",
)
PROMPTS_PER_CENTRE = 64
DRAWS = 3  # generations per target, each from other prompts


class Target(NamedTuple):
    """One dataset to make an adapter for."""

    split: str
    pair: Pair
    train_file: Path
    """Labelled rows of the training creatures, for the oracle alone."""
    test_file: Path
    """Rows of the test creatures: their prompts are given to the generator, their answers score."""


@dataclass
class Table:
    accuracy: dict[str, dict[str, float]]
    """split -> column -> exact match, the mean over the split's targets."""
    spread: dict[str, dict[str, float]]
    """split -> standard deviation of `generated` over targets, and over draws of prompts."""
    seconds_to_generate: float
    """From prompts to files, the mean over all generations."""

    def as_dict(self) -> dict[str, Any]:
        return {
            "accuracy": self.accuracy,
            "spread": self.spread,
            "seconds": {"generate_adapter": round(self.seconds_to_generate, 4)},
        }


@dataclass
class Contest:
    base: BaseModel
    generator: Generator
    encoder: Encoder
    runs: Sequence[Path]
    multi_task: Adapter
    oracles: Mapping[Path, Adapter]
    generated: Path
    """Where the generated adapters are kept."""
    _seconds: list[float] = field(default_factory=list)

    def hold(self, targets: Sequence[Target]) -> Table:
        scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        draws: dict[str, list[float]] = defaultdict(list)
        no_adapter = {t.test_file: self._score_base(read_rows(t.test_file)) for t in targets}
        for target in targets:
            rows = read_rows(target.test_file)
            prompts = drawn_prompts(rows, DRAWS)
            columns = self._contestants(target, targets, prompts[0])
            scores[target.split]["base"].append(no_adapter[target.test_file])
            for column, adapter in columns.items():
                scores[target.split][column].append(self._score(adapter, rows))
            generations = [self._generated(target, n, drawn) for n, drawn in enumerate(prompts)]
            accuracies = [self._score(adapter, rows) for adapter in generations]
            scores[target.split]["generated"].append(fmean(accuracies))
            draws[target.split].append(pstdev(accuracies))
        return Table(
            accuracy={
                split: {column: round(fmean(of[column]), 4) for column in COLUMNS}
                for split, of in scores.items()
            },
            spread={
                split: {
                    "over_targets": round(pstdev(of["generated"]), 4),
                    "over_draws": round(fmean(draws[split]), 4),
                }
                for split, of in scores.items()
            },
            seconds_to_generate=fmean(self._seconds),
        )

    def _contestants(
        self, target: Target, targets: Sequence[Target], prompts: Sequence[str]
    ) -> dict[str, Adapter]:
        stranger = unrelated(target, targets)
        foreign = drawn_prompts(read_rows(stranger.test_file), 1)[0]
        return {
            "mean_adapter": self._mean_adapter,
            "nearest_adapter": self._nearest_adapter(prompts),
            "multi_task": self.multi_task,
            "random_prompts": self.generator.generate(foreign),
            "oracle": self.oracles[target.train_file],
        }

    def _generated(self, target: Target, draw: int, prompts: Sequence[str]) -> Adapter:
        directory = self.generated / target.split / target.pair.name / f"draw-{draw}"
        result = infer(self.generator, prompts, directory)
        self._seconds.append(result.seconds)
        return read_adapter(directory)

    @cached_property
    def _mean_adapter(self) -> Adapter:
        """The mean of all training checkpoints, which the generator's normalisation holds."""
        tensors = self.generator.layout.unpack(self.generator.normalization.mean)
        return Adapter(dict(self.generator.adapter_config), tensors)

    def _nearest_adapter(self, prompts: Sequence[str]) -> Adapter:
        """Of the training dataset whose prompts have the most similar mean embedding."""
        similarity = torch.cosine_similarity(self._centre(prompts), self._run_centres, dim=-1)
        return read_adapter(self.runs[int(similarity.argmax())] / "adapter")

    @cached_property
    def _run_centres(self) -> Tensor:
        """``[runs, dim]``: the mean embedding of each training dataset's prompts."""
        files = [Path(read_manifest(run, LoraManifest).dataset.path) for run in self.runs]
        return torch.stack(
            [self._centre(read_prompts(file)[:PROMPTS_PER_CENTRE]) for file in files]
        )

    def _centre(self, prompts: Sequence[str]) -> Tensor:
        return self.encoder(prompts)[0].mean(dim=(0, 1))  # (dim,)

    def _score(self, adapter: Adapter, rows: Sequence[Row]) -> float:
        swap_adapter(self._model, adapter, "a contestant")
        return self._exact_match(rows)

    def _score_base(self, rows: Sequence[Row]) -> float:
        with self._model.disable_adapter():
            return self._exact_match(rows)

    def _exact_match(self, rows: Sequence[Row]) -> float:
        scores = evaluate(self._model, self.base.tokenizer, rows, len(rows), choices=False)
        return scores.exact_match

    @cached_property
    def _model(self) -> Any:
        """The base with an adapter attached, whose weights are then swapped."""
        return attach_adapter(self.base.model, self._mean_adapter, "the mean adapter")


def drawn_prompts(rows: Sequence[Row], draws: int) -> list[list[str]]:
    """`draws` times `PROMPTS` prompts of a dataset, without their answers."""
    prompts = [row.prompt for row in rows]
    return [
        Random(f"prompts:{n}").sample(prompts, min(PROMPTS, len(prompts))) for n in range(draws)
    ]


def unrelated(target: Target, targets: Sequence[Target]) -> Target:
    """Another target of the split that shares neither attribute nor style, if there is one."""
    others = [other for other in targets if other.split == target.split and other != target]
    strangers = [other for other in others if not set(other.pair) & set(target.pair)]
    after = sorted(strangers or others, key=lambda other: other.pair <= target.pair)
    return after[0]
