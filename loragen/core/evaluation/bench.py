"""What all contestants share: the base, the generator, what it learned from, what was trained."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from loragen.core.adapters import Adapter
from loragen.core.base_models import BaseModel
from loragen.core.config.gen_schema import GenData, SourceSection
from loragen.core.errors import UsageError
from loragen.core.evaluation.targets import Target
from loragen.core.files import sha256_text
from loragen.core.generator.collections.found import PromptDirectories
from loragen.core.generator.collections.sources import Collection, read_source
from loragen.core.generator.inference.draws import draw_prompts
from loragen.core.generator.model import Generator
from loragen.core.manifests import SourceRecord

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
    centres: dict[str, np.ndarray] = field(default_factory=dict)
    """What `centre` has computed, ``[dim]`` each, by the hash of the texts; arrays, which travel
    between processes at no cost but their size."""

    def draws(self, target: Target) -> list[list[str]]:
        """`options.draws` samples of the target's prompts, the same ones for every contestant.

        Raises UsageError where there are too few prompts for draws to differ.
        """
        return drawn(target, self.generator, self.options)

    def mean_adapter(self) -> Adapter:
        """The mean of all training checkpoints, which the generator's normalisation holds."""
        tensors = self.generator.layout.unpack(self.generator.normalization.mean)
        return Adapter(dict(self.generator.adapter_config), tensors)

    def similarities(self, prompts: Sequence[str], others: Iterable[Sequence[str]]) -> Tensor:
        """``[others]``: cosine similarity of mean prompt embeddings."""
        centres = torch.from_numpy(np.stack([self.centre(other) for other in others]))
        return torch.cosine_similarity(torch.from_numpy(self.centre(prompts)), centres, dim=-1)

    def centre(self, prompts: Sequence[str]) -> np.ndarray:
        """``[dim]``: the mean embedding of a dataset's first prompts, computed once."""
        first = list(prompts[:PROMPTS_PER_CENTRE])
        key = sha256_text(*first)
        if key not in self.centres:
            embeddings, mask = self.generator.embed(first)  # (texts, positions, dim)
            weights = mask.unsqueeze(-1).to(embeddings)
            mean = (embeddings * weights).sum((0, 1)) / weights.sum()
            self.centres[key] = mean.cpu().numpy()
        return self.centres[key]


def drawn(target: Target, generator: Generator, options: Options) -> list[list[str]]:
    """`Bench.draws`, before there is a bench."""
    usual = generator.usual_prompts
    return draw_prompts(target.prompts, options.draws, options.prompts, options.seed, usual)


def training_sources(generator: Generator) -> list[Collection]:
    """The datasets that the generator was trained on, with the checkpoints and the prompts that it
    saw.

    Raises LoragenError where one is not there any more.
    """
    found = _recorded(generator.provenance)
    if not found:
        raise UsageError("the generator's file does not name the runs that it learned from")
    prepared = PromptDirectories(GenData(samples_per_prompt=generator.samples_per_prompt))
    return [read_source(source, count, prepared) for source, count in found]


def _recorded(provenance: Mapping[str, Any]) -> list[tuple[SourceSection, int]]:
    """Each source and how many checkpoints of it were learned from; a file of an older loragen
    knows only where they lie."""
    records = [SourceRecord.model_validate(one) for one in provenance.get("source_records", [])]
    learned = [one for one in records if not one.held_out]
    if learned and all(one.place for one in learned):
        return [
            (SourceSection(checkpoints=one.place, prompts=one.prompts_from), one.count)
            for one in learned
        ]
    places = provenance.get("sources", [])
    return [(SourceSection(checkpoints=place), ALL_CHECKPOINTS) for place in places]
