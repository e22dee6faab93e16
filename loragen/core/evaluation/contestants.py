"""The contestants of `gen eval`: each gives the adapters that answer a dataset's questions.

Light: the columns of the table are chosen before torch is imported. A new column is a class with
`entries`, listed in `CONTESTANTS`.
"""

import logging
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from loragen.core.data.dataset import Row
from loragen.core.data.formats import Turn
from loragen.core.errors import UsageError, did_you_mean, listing
from loragen.core.evaluation.targets import Target
from loragen.core.files import sha256_text
from loragen.core.generator.requests import draw_prompts

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from loragen.core.adapter.files import Adapter
    from loragen.core.base.load import LanguageModel
    from loragen.core.generator.model import Generator
    from loragen.core.learning.sources import TrainingSource
    from loragen.core.run.directory import LoraRun

log = logging.getLogger(__name__)

EMBEDDED_PROMPTS = 32
"""The number of first prompts whose mean embedding represents a dataset."""
UNLIMITED = 2**31
"""The context length of a model whose configuration states none."""


class Entry(NamedTuple):
    """One adapter to be scored."""

    adapter: "Adapter | None"
    """None: the base model alone."""
    seconds: float | None = None
    """The time needed to obtain the adapter for this dataset; None if there is none to obtain."""
    rows: Sequence[Row] | None = None
    """The tested rows with other prompts; None: the rows as they are."""


class TrainedAdapter(NamedTuple):
    """A LoRA trained for the comparison: a checkpoint of a run."""

    run: "LoraRun"
    checkpoint: Path

    @property
    def seconds(self) -> float:
        """The wall-clock time of the training."""
        return self.run.manifest.seconds or 0.0

    @property
    def steps(self) -> int:
        """The steps until the training ended."""
        return self.run.manifest.steps[-1]

    def entry(self) -> Entry:
        from loragen.core.run.checkpoints import load_adapter

        config = self.run.manifest.adapter_config
        return Entry(load_adapter(self.checkpoint, config), self.seconds)


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of an evaluation that hold for all contestants."""

    draws: int = 5
    """Adapters generated for each dataset, each from a random draw of its prompts."""
    prompts: int | None = None
    """Prompts of a draw; None: as many as in the generator's training, at most half of all."""
    shots: int = 4
    """Labelled rows before the question, for few-shot prompting."""
    seed: int = 0
    """Seed of the draws of prompts and of few-shot rows."""
    batch_size: int = 32
    """Rows answered at once."""
    choices: bool = True
    """Whether the choice accuracy is measured, which costs a forward pass per row and choice."""
    keep: Path | None = None
    """The directory that keeps the generated adapters; None: they are deleted."""


def draws_of(target: Target, generator: "Generator", options: EvaluationOptions) -> list[list[str]]:
    """Returns `options.draws` samples of the dataset's prompts, the same for every contestant.

    Raises UsageError if there are too few prompts for the draws to differ.
    """
    usual = generator.usual_prompts
    return draw_prompts(target.prompts, options.draws, options.prompts, options.seed, usual)


@dataclass(frozen=True)
class EvaluationSetup:
    """The models, datasets and options that all contestants share."""

    base: "LanguageModel"
    generator: "Generator"
    sources: Sequence["TrainingSource"] = ()
    """The generator's training datasets; empty if no column needs them."""
    multi_task: TrainedAdapter | None = None
    oracles: Mapping[tuple[str, str], TrainedAdapter] = field(default_factory=dict)
    """The oracle adapter of each `Target.key`."""
    options: EvaluationOptions = EvaluationOptions()
    embeddings: dict[str, "np.ndarray"] = field(default_factory=dict)
    """Mean prompt embeddings computed so far, ``[dim]`` each, by the hash of the prompts."""

    def mean_adapter(self) -> "Adapter":
        """Returns the mean of all training checkpoints, from the generator's normalisation."""
        from loragen.core.adapter.files import Adapter

        tensors = self.generator.layout.unpack(self.generator.normalization.mean)
        return Adapter(dict(self.generator.adapter_config), tensors)

    def mean_embedding(self, prompts: Sequence[str]) -> "np.ndarray":
        """Returns ``[dim]``: the mean embedding of a dataset's first prompts, computed once."""
        first = list(prompts[:EMBEDDED_PROMPTS])
        key = sha256_text(*first)
        if key not in self.embeddings:
            embedded, mask = self.generator.embed(first)  # (texts, positions, dim)
            weights = mask.unsqueeze(-1).to(embedded)
            mean = (embedded * weights).sum((0, 1)) / weights.sum()
            self.embeddings[key] = mean.cpu().numpy()
        return self.embeddings[key]

    def similarities(self, prompts: Sequence[str], others: Iterable[Sequence[str]]) -> "Tensor":
        """Returns ``[others]``: cosine similarities of mean prompt embeddings."""
        import numpy as np
        import torch

        means = torch.from_numpy(np.stack([self.mean_embedding(other) for other in others]))
        return torch.cosine_similarity(
            torch.from_numpy(self.mean_embedding(prompts)), means, dim=-1
        )


class Contestant(ABC):
    """One column of the table."""

    name: ClassVar[str]
    """The column's name in the results and in `--columns`."""
    title: ClassVar[str]
    """The column's header; `{shots}` is replaced by the number of few-shot rows."""
    trains: ClassVar[bool] = False
    """Whether a LoRA is trained for it first; such a column is evaluated on demand only."""
    needs_sources: ClassVar[bool] = False
    """Whether it reads the generator's training runs, which may be on another machine."""
    sources_if_alone: ClassVar[bool] = False
    """Whether it reads them only if a single dataset is evaluated."""

    def __init__(self, setup: EvaluationSetup) -> None:
        self.setup = setup

    @classmethod
    def reads_sources(cls, datasets: int) -> bool:
        """Returns whether an evaluation of so many datasets reads the training runs."""
        return cls.needs_sources and (datasets == 1 or not cls.sources_if_alone)

    @abstractmethod
    def entries(self, target: Target, targets: Sequence[Target]) -> Iterator[Entry]:
        """Yields one entry, or one for each draw of prompts, whose mean score is reported.

        `targets` are all datasets of the evaluation. The labels of `target.rows` may be used for
        scoring only.
        """


class BaseAlone(Contestant):
    """The base model without an adapter."""

    name, title = "base", "base"

    def entries(self, target: Target, targets: Sequence[Target]) -> Iterator[Entry]:
        yield Entry(None)


class MeanAdapter(Contestant):
    """The element-wise mean of all training checkpoints: the best adapter that a generator can give
    if it ignores its prompts."""

    name, title = "mean_adapter", "mean"

    def entries(self, target: Target, targets: Sequence[Target]) -> Iterator[Entry]:
        yield _timed(self.setup.mean_adapter)


class NearestAdapter(Contestant):
    """The last adapter of the training dataset whose prompts are the most similar on average."""

    name, title, needs_sources = "nearest_adapter", "nearest", True

    def entries(self, target: Target, targets: Sequence[Target]) -> Iterator[Entry]:
        from loragen.core.run.checkpoints import load_adapter

        def nearest() -> "Adapter":
            sources = self.setup.sources
            similarity = self.setup.similarities(target.prompts, (s.prompts for s in sources))
            source = sources[int(similarity.argmax())]
            return load_adapter(source.checkpoints[-1], source.adapter_config)

        yield _timed(nearest)


class MultiTask(Contestant):
    """One LoRA trained on the rows of all training datasets together."""

    name, title = "multi_task", "multi-task"
    trains = needs_sources = True

    @cached_property
    def entry(self) -> Entry:
        """The same adapter for every dataset, read once."""
        assert self.setup.multi_task is not None
        return self.setup.multi_task.entry()

    def entries(self, target: Target, targets: Sequence[Target]) -> Iterator[Entry]:
        yield self.entry


class FewShot(Contestant):
    """The base model with labelled rows of the dataset before each question, as turns of a chat."""

    name, title = "few_shot", "{shots}-shot"

    def entries(self, target: Target, targets: Sequence[Target]) -> Iterator[Entry]:
        shots = self.setup.options.shots
        pool = list(target.train_rows or target.rows)
        Random(f"shots:{self.setup.options.seed}:{target.name}").shuffle(pool)
        rows = [self._with_shots(row, pool) for row in target.rows]
        short = sum(
            len(prompted.history) - len(row.history) < shots
            for prompted, row in zip(rows, target.rows, strict=True)
        )
        if short:
            log.warning("%s: %d rows have fewer than %d shots", target.name, short, shots)
        yield Entry(None, rows=rows)

    def _with_shots(self, row: Row, pool: Sequence[Row]) -> Row:
        """Returns the row with a history of the pool's first rows that have other prompts, and of
        fewer rows if the model's context is too short."""
        from loragen.core.data.tokenize import answer_ids, prompt_ids

        tokenizer, config = self.setup.base.tokenizer, self.setup.base.model.config
        context = getattr(config, "max_position_embeddings", None) or UNLIMITED
        others = (other for other in pool if other.prompt != row.prompt)
        turns = [Turn(o.prompt, o.response) for o in islice(others, self.setup.options.shots)]
        answer = len(answer_ids(tokenizer, row.response))
        while turns:
            history = (*turns, *row.history)
            if len(prompt_ids(tokenizer, row.prompt, row.system, history)) + answer <= context:
                return replace(row, history=history)
            turns.pop(0)
        return row


class RandomPrompts(Contestant):
    """An adapter generated from the prompts of the least similar dataset: if it answers as well as
    the generated one, the generator does not use its prompts."""

    name, title = "random_prompts", "random prompts"
    needs_sources = sources_if_alone = True  # several datasets use each other's prompts

    def entries(self, target: Target, targets: Sequence[Target]) -> Iterator[Entry]:
        others = [t.prompts for t in targets if t.group == target.group and t.name != target.name]
        others = others or [source.prompts for source in self.setup.sources]
        least = int(self.setup.similarities(target.prompts, others).argmin())
        generator = self.setup.generator
        prompts = others[least][: generator.usual_prompts]
        yield _timed(lambda: generator.generate(prompts))


class GeneratedAdapters(Contestant):
    """Adapters generated from unlabelled prompts of the dataset, one for each draw of prompts."""

    name, title = "generated", "generated"

    def entries(self, target: Target, targets: Sequence[Target]) -> Iterator[Entry]:
        from loragen.core.run.checkpoints import load_adapter

        generator, options = self.setup.generator, self.setup.options
        _ = generator.text_encoder  # loaded now, so that its time does not count
        for number, prompts in enumerate(draws_of(target, generator, options)):
            with tempfile.TemporaryDirectory() as temporary:
                parent = (options.keep or Path(temporary)) / target.group / target.name
                directory = parent / f"draw-{number}"
                started = time.perf_counter()
                generator.generate(prompts).save(directory)
                seconds = round(time.perf_counter() - started, 4)
                yield Entry(load_adapter(directory), seconds)


class Oracle(Contestant):
    """The LoRA trained on the dataset's own labels: an upper bound."""

    name, title = "oracle", "oracle"
    trains = needs_sources = True

    def entries(self, target: Target, targets: Sequence[Target]) -> Iterator[Entry]:
        yield self.setup.oracles[target.key].entry()


CONTESTANTS: tuple[type[Contestant], ...] = (
    BaseAlone,
    MeanAdapter,
    NearestAdapter,
    MultiTask,
    FewShot,
    RandomPrompts,
    GeneratedAdapters,
    Oracle,
)
"""All contestants, in the order of the table's columns."""
NAMES = tuple(contestant.name for contestant in CONTESTANTS)
GENERATED, MULTI_TASK, ORACLE = GeneratedAdapters.name, MultiTask.name, Oracle.name


def choose(wanted: Sequence[str], also: Iterable[str] = ()) -> list[type[Contestant]]:
    """Returns the contestants named, in the table's order; by default, all that train nothing.

    `also` are further names. `-` and `_` are the same. Raises UsageError for an unknown name.
    """
    names = [name.strip().replace("-", "_") for name in wanted if name.strip()]
    for name in names:
        if name not in NAMES:
            raise UsageError(
                f"--columns: unknown column '{name}'.{did_you_mean(name, NAMES)} "
                f"There are: {listing(NAMES)}"
            )
    names = names or [contestant.name for contestant in CONTESTANTS if not contestant.trains]
    return [contestant for contestant in CONTESTANTS if contestant.name in {*names, *also}]


def titles(shots: int) -> dict[str, str]:
    """Returns the header of each column."""
    return {one.name: one.title.format(shots=shots) for one in CONTESTANTS}


def _timed(obtain: Callable[[], "Adapter"]) -> Entry:
    started = time.perf_counter()
    adapter = obtain()
    return Entry(adapter, time.perf_counter() - started)
