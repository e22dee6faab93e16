"""What all contestants share: the base, the generator, what it learned from, what was trained."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from loragen.core.adapters import Adapter
from loragen.core.base_models import BaseModel
from loragen.core.config.gen_schema import SourceSection
from loragen.core.errors import UsageError
from loragen.core.evaluation.targets import Target
from loragen.core.files import sha256_text
from loragen.core.generator.collections.sources import Collection, read_source
from loragen.core.generator.inference.draws import draw_prompts
from loragen.core.generator.model import Generator

PROMPTS_PER_CENTRE = 32
ALL_CHECKPOINTS = 2**31


class Trained(NamedTuple):
    """A LoRA trained for the comparison."""

    path: Path
    """A run, an adapter or a checkpoint, as `read_checkpointed_adapter` reads it."""
    seconds: float
    steps: int


@dataclass(frozen=True)
class Options:
    draws: int = 5
    """Generations a dataset, each from other prompts."""
    prompts: int | None = None
    """Prompts a draw; None: as many as in the generator's training, at most half of all."""
    shots: int = 4
    """Labelled rows before the question, for k-shot prompting."""
    seed: int = 0
    """Of the draws of prompts and shots."""
    batch_size: int = 32
    """Rows answered at once."""
    choices: bool = True
    """Whether the choice accuracy is measured, a forward pass per row and choice."""
    keep: Path | None = None
    """Where the generated adapters are kept; None: nowhere."""


@dataclass(frozen=True)
class Bench:
    base: BaseModel
    generator: Generator
    sources: Sequence[Collection] = ()
    """What the generator learned from; empty where no column needs it."""
    multi_task: Trained | None = None
    oracles: Mapping[tuple[str, str], Trained] = field(default_factory=dict)
    """By `Target.key`."""
    options: Options = Options()
    _centres: dict[str, Tensor] = field(default_factory=dict)

    def draws(self, target: Target) -> list[list[str]]:
        """`options.draws` samples of the target's prompts, the same ones for every contestant.

        Raises UsageError where there are too few prompts for draws to differ.
        """
        options = self.options
        usual = self.generator.usual_prompts
        return draw_prompts(target.prompts, options.draws, options.prompts, options.seed, usual)

    def mean_adapter(self) -> Adapter:
        """The mean of all training checkpoints, which the generator's normalisation holds."""
        tensors = self.generator.layout.unpack(self.generator.normalization.mean)
        return Adapter(dict(self.generator.adapter_config), tensors)

    def similarities(self, prompts: Sequence[str], others: Iterable[Sequence[str]]) -> Tensor:
        """``[others]``: cosine similarity of mean prompt embeddings."""
        centres = torch.stack([self._centre(other) for other in others])
        return torch.cosine_similarity(self._centre(prompts), centres, dim=-1)

    def _centre(self, prompts: Sequence[str]) -> Tensor:
        """``[dim]``: the mean embedding of a dataset's first prompts, computed once."""
        first = list(prompts[:PROMPTS_PER_CENTRE])
        key = sha256_text(*first)
        if key not in self._centres:
            embeddings, mask = self.generator.embed(first)  # (texts, positions, dim)
            weights = mask.unsqueeze(-1).to(embeddings)
            self._centres[key] = (embeddings * weights).sum((0, 1)) / weights.sum()
        return self._centres[key]


def training_sources(generator: Generator) -> list[Collection]:
    """The datasets that the generator was trained on, through the manifests of their runs.

    Raises LoragenError where one is not there any more, or is no run of `lora train`.
    """
    places = generator.provenance.get("sources", [])
    if not places:
        raise UsageError("the generator's file does not name the runs that it learned from")
    return [read_source(SourceSection(checkpoints=place), ALL_CHECKPOINTS) for place in places]
