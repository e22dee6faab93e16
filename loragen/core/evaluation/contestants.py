"""The columns of the table: which there are and where each one's class stands. Light.

A new column is one class with `entries` (see `contestants.Contestant`) and one line here.

What all contestants share: the base, the generator, what it learned from, what was trained.

The contestants: each gives, for a dataset, the adapter that answers its questions.

`columns.COLUMNS` lists them; a new one is a class here, or anywhere, and a line there.
"""

import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from loragen.core.adapter.files import Adapter, read_adapter
from loragen.core.base.load import LanguageModel
from loragen.core.config.schema import GenDataSection, SourceSection
from loragen.core.data.formats import Turn
from loragen.core.data.rows import Row
from loragen.core.data.tokenize import answer_ids, prompt_ids
from loragen.core.errors import UsageError, did_you_mean, listing
from loragen.core.evaluation.targets import Target
from loragen.core.files import sha256_text
from loragen.core.generator.model import Generator
from loragen.core.generator.requests import draw_prompts
from loragen.core.learning.sources import PromptDirectories, TrainingSource, read_source
from loragen.core.run.checkpoints import read_checkpointed_adapter
from loragen.core.run.directory import SourceRecord

log = logging.getLogger(__name__)

GENERATED = "generated"
MULTI_TASK = "multi_task"
ORACLE = "oracle"


class Column(NamedTuple):
    name: str
    title: str
    """Above the column; `{shots}` is their number."""
    contestant: str
    """`module:Class`, imported when the column is wanted."""
    trains: bool = False
    """Trains a LoRA first, and so only on demand."""
    needs_sources: bool = False
    """Reads the generator's training runs, which may be on another machine."""
    if_alone: bool = False
    """Needs them only where a single dataset is evaluated: of several, another one serves."""

    def reads_sources(self, datasets: int) -> bool:
        """In an evaluation of as many datasets."""
        return self.needs_sources and (datasets == 1 or not self.if_alone)


_HERE = "loragen.core.evaluation.contestants"

COLUMNS = (
    Column("base", "base", f"{_HERE}:Base"),
    Column("mean_adapter", "mean", f"{_HERE}:MeanAdapter"),
    Column("nearest_adapter", "nearest", f"{_HERE}:NearestAdapter", needs_sources=True),
    Column(MULTI_TASK, "multi-task", f"{_HERE}:MultiTask", trains=True, needs_sources=True),
    Column("few_shot", "{shots}-shot", f"{_HERE}:FewShot"),
    Column(
        "random_prompts",
        "random prompts",
        f"{_HERE}:RandomPrompts",
        needs_sources=True,
        if_alone=True,
    ),
    Column(GENERATED, "generated", f"{_HERE}:Generated"),
    Column(ORACLE, "oracle", f"{_HERE}:Oracle", trains=True, needs_sources=True),
)
NAMES = tuple(column.name for column in COLUMNS)


def chosen(wanted: Sequence[str], also: Iterable[str] = ()) -> list[Column]:
    """The columns named, in the table's order; for none named all that need no training. `also`
    are further names. `-` and `_` are the same.

    Raises UsageError for an unknown name.
    """
    names = [name.strip().replace("-", "_") for name in wanted if name.strip()]
    for name in names:
        if name not in NAMES:
            raise UsageError(
                f"--columns: unknown column '{name}'.{did_you_mean(name, NAMES)} "
                f"There are: {listing(NAMES)}"
            )
    names = names or [column.name for column in COLUMNS if not column.trains]
    return [column for column in COLUMNS if column.name in {*names, *also}]


def contestant_class(column: Column) -> Any:
    """The class that competes in the column."""
    module, _, name = column.contestant.partition(":")
    return getattr(import_module(module), name)


def titles(shots: int) -> dict[str, str]:
    """What stands above each column."""
    return {column.name: column.title.format(shots=shots) for column in COLUMNS}


PROMPTS_PER_CENTRE = 32
ALL_CHECKPOINTS = 2**31


class Trained(NamedTuple):
    """A LoRA trained for the comparison."""

    path: Path
    """A run, an adapter or a checkpoint, as `read_checkpointed_adapter` reads it."""
    seconds: float
    steps: int


@dataclass(frozen=True)
class EvaluationOptions:
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
    base: LanguageModel
    generator: Generator
    sources: Sequence[TrainingSource] = ()
    """What the generator learned from; empty where no column needs it."""
    multi_task: Trained | None = None
    oracles: Mapping[tuple[str, str], Trained] = field(default_factory=dict)
    """By `Target.key`."""
    options: EvaluationOptions = EvaluationOptions()
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


def drawn(target: Target, generator: Generator, options: EvaluationOptions) -> list[list[str]]:
    """`Bench.draws`, before there is a bench."""
    usual = generator.usual_prompts
    return draw_prompts(target.prompts, options.draws, options.prompts, options.seed, usual)


def training_sources(generator: Generator) -> list[TrainingSource]:
    """The datasets that the generator was trained on, with the checkpoints and the prompts that it
    saw.

    Raises LoragenError where one is not there any more.
    """
    found = _recorded(generator.provenance)
    if not found:
        raise UsageError("the generator's file does not name the runs that it learned from")
    prepared = PromptDirectories(GenDataSection(samples_per_prompt=generator.samples_per_prompt))
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


class Entry(NamedTuple):
    """One adapter, ready to be tested."""

    adapter: Adapter | None
    """None: the base as it is."""
    seconds: float | None = None
    """What it took to obtain the adapter for this dataset."""
    rows: Sequence[Row] | None = None
    """The tested rows as they are to be asked, where that is not as they stand."""


class Contestant(Protocol):
    """One column of the table."""

    def __init__(self, bench: Bench) -> None: ...

    def entries(self, target: Target, targets: Sequence[Target]) -> Iterator[Entry]:
        """One entry, or one for each draw of prompts; the score is their mean. `targets` are all
        datasets of the evaluation. The labels of `target.rows` are for scoring alone."""
        ...


class _OfBench:
    def __init__(self, bench: Bench) -> None:
        self.bench = bench


class Base(_OfBench):
    """The base model without an adapter."""

    def entries(self, target: Target, targets: Sequence[Target]) -> Iterator[Entry]:
        yield Entry(None)


class MeanAdapter(_OfBench):
    """The element-wise mean of all training checkpoints: what a generator that ignores its prompts
    would make."""

    def entries(self, target: Target, targets: Sequence[Target]) -> Iterator[Entry]:
        yield _timed(self.bench.mean_adapter)


class NearestAdapter(_OfBench):
    """The last adapter of the training dataset whose prompts are most similar on average."""

    def entries(self, target: Target, targets: Sequence[Target]) -> Iterator[Entry]:
        yield _timed(lambda: self._nearest(target))

    def _nearest(self, target: Target) -> Adapter:
        sources = self.bench.sources
        similarity = self.bench.similarities(target.prompts, (s.prompts for s in sources))
        return read_checkpointed_adapter(sources[int(similarity.argmax())].checkpoints[-1])


class MultiTask(_OfBench):
    """One LoRA trained on the rows of all training datasets together."""

    def entries(self, target: Target, targets: Sequence[Target]) -> Iterator[Entry]:
        yield self._entry

    @cached_property
    def _entry(self) -> Entry:
        assert self.bench.multi_task is not None
        return _trained(self.bench.multi_task)


class Oracle(_OfBench):
    """The LoRA trained on the dataset's own labels."""

    def entries(self, target: Target, targets: Sequence[Target]) -> Iterator[Entry]:
        yield _trained(self.bench.oracles[target.key])


class FewShot(_OfBench):
    """The base with labelled rows of the dataset before each question, as turns of a chat."""

    def entries(self, target: Target, targets: Sequence[Target]) -> Iterator[Entry]:
        options, base = self.bench.options, self.bench.base
        pool = list(target.train_rows or target.rows)
        Random(f"shots:{options.seed}:{target.name}").shuffle(pool)
        room = getattr(base.model.config, "max_position_embeddings", None) or 2**31
        rows = [_with_shots(row, pool, options.shots, base.tokenizer, room) for row in target.rows]
        short = sum(
            len(asked.history) - len(row.history) < options.shots
            for asked, row in zip(rows, target.rows, strict=True)
        )
        if short:
            log.warning("%s: %d rows have fewer than %d shots", target.name, short, options.shots)
        yield Entry(None, rows=rows)


class RandomPrompts(_OfBench):
    """Generated from the prompts of the dataset that is least like this one: if it answers as
    well, the generator does not read its prompts."""

    def entries(self, target: Target, targets: Sequence[Target]) -> Iterator[Entry]:
        generator = self.bench.generator
        prompts = self._foreign(target, targets)[: generator.usual_prompts]
        yield _timed(lambda: generator.generate(prompts))

    def _foreign(self, target: Target, targets: Sequence[Target]) -> Sequence[str]:
        """Another evaluated dataset of the group; where there is none, a training dataset."""
        others = [t.prompts for t in targets if t.group == target.group and t != target]
        others = others or [source.prompts for source in self.bench.sources]
        return others[int(self.bench.similarities(target.prompts, others).argmin())]


class Generated(_OfBench):
    """What the generator makes of unlabelled prompts of the dataset, once for each draw of them."""

    def entries(self, target: Target, targets: Sequence[Target]) -> Iterator[Entry]:
        for number, prompts in enumerate(self.bench.draws(target)):
            with tempfile.TemporaryDirectory() as temporary:
                place = self.bench.options.keep or Path(temporary)
                directory = place / target.group / target.name / f"draw-{number}"
                _ = self.bench.generator.text_encoder  # the time to load it does not count
                started = time.perf_counter()
                self.bench.generator.generate(prompts).save(directory)
                seconds = round(time.perf_counter() - started, 4)
                yield Entry(read_adapter(directory), seconds)


def _timed(make: Callable[[], Adapter]) -> Entry:
    started = time.perf_counter()
    adapter = make()
    return Entry(adapter, time.perf_counter() - started)


def _trained(trained: Trained) -> Entry:
    return Entry(read_checkpointed_adapter(trained.path), trained.seconds)


def _with_shots(row: Row, pool: Sequence[Row], shots: int, tokenizer: Any, room: int) -> Row:
    """The row after the first `shots` rows of the pool that ask something else, fewer where the
    model has no room for them; the row itself is never among them."""
    others = (other for other in pool if other.prompt != row.prompt)
    turns = [Turn(other.prompt, other.response) for other in islice(others, shots)]
    answer = len(answer_ids(tokenizer, row.response))
    while turns:
        history = (*turns, *row.history)
        if len(prompt_ids(tokenizer, row.prompt, row.system, history)) + answer <= room:
            return row.model_copy(update={"history": history})
        turns.pop(0)
    return row
