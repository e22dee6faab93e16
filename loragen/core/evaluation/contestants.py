"""The contestants of `gen eval`: each gives the adapters that answer a dataset's questions.

Light: the columns of the table are chosen before torch is imported. A new column is a class with
`entries`, listed in `CONTESTANTS`.
"""

import logging
import re
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from random import Random
from string import ascii_lowercase
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
    from loragen.core.adapter.ridge import KernelRidge
    from loragen.core.base.load import LanguageModel
    from loragen.core.generator.model import Generator
    from loragen.core.learning.sources import TrainingSource
    from loragen.core.run.directory import LoraRun

log = logging.getLogger(__name__)

MEASURES = {
    "accuracy": "exact match",
    "choice_accuracy": "choice accuracy",
    "format_validity": "format validity",
    "loss": "loss (nats a token)",
}
"""What is measured of each column, and the header of its table."""
LABEL_SIZES = (5, 10, 20, 50, 100, 300)
"""The numbers of labelled rows of the label curve."""
LOADED_BYTES = 2**30
"""The memory for adapters that are all multiplied with each other, two blocks of them at a time."""
UNLIMITED = 2**31
"""The context length of a model whose configuration states none."""


@dataclass(frozen=True, eq=False)
class Routed:
    """Several adapters between which PEFT's Arrow router (arXiv 2405.11157) chooses at every token
    and module: the `top_k` adapters whose first right singular vector is most like the token."""

    adapters: Sequence["Adapter"]
    top_k: int = 3


class Entry(NamedTuple):
    """What is scored: the base with one adapter, with several, or alone."""

    adapter: "Adapter | Routed | None"
    """None: the base model alone."""
    seconds: float | None = None
    """The time needed to obtain the adapter for this dataset; None if there is none to obtain."""
    rows: Sequence[Row] | None = None
    """The tested rows with other prompts; None: the rows as they are."""
    seeded: bool = False
    """Of a column whose best entry counts: whether it is scored on all rows in any case."""


class TrainedAdapter(NamedTuple):
    """A LoRA trained for the comparison: a checkpoint of a run."""

    run: "LoraRun"
    checkpoint: Path
    rivals: Sequence["LoraRun"] = ()
    """Other runs, over which this one was chosen on validation rows."""

    @property
    def seconds(self) -> float:
        """The wall-clock time of the training, with that of its rivals."""
        return sum(run.manifest.seconds or 0.0 for run in (self.run, *self.rivals))

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
    """Adapters generated for each dataset, each from a random draw of its prompts; and of each
    control, from other prompts."""
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
    ignore_final_punctuation: bool = False
    """Whether answers are compared without punctuation at their end."""
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
    labelled: Mapping[tuple[str, str, int], TrainedAdapter] = field(default_factory=dict)
    """The adapter trained on a number of labelled rows, by `Target.key` and that number."""
    options: EvaluationOptions = EvaluationOptions()
    embeddings: dict[str, "np.ndarray"] = field(default_factory=dict)
    """Mean prompt embeddings computed so far, ``[dim]`` each, by the hash of the prompts."""

    @property
    def adapters_at_once(self) -> int:
        """The collected adapters, in float32, that `LOADED_BYTES` hold twice; 64 at most."""
        return max(1, min(64, LOADED_BYTES // (2 * 4 * self.generator.layout.values)))

    def mean_adapter(self) -> "Adapter":
        """Returns the mean of all training checkpoints, from the generator's normalisation."""
        from loragen.core.adapter.files import Adapter

        tensors = self.generator.layout.unpack(self.generator.mean_adapter)
        return Adapter(dict(self.generator.adapter_config), tensors)

    def collected(self, index: int) -> "Adapter":
        """Returns the last adapter of a training dataset."""
        from loragen.core.run.checkpoints import load_adapter

        source = self.sources[index]
        return load_adapter(source.checkpoints[-1], source.adapter_config)

    def mean_embedding(self, prompts: Sequence[str]) -> "np.ndarray":
        """Returns ``[dim]``: the mean embedding of all prompts of a dataset, computed once."""
        from loragen.core.data.prompts import joined_texts
        from loragen.core.generator.embeddings import mean_embedding

        key = sha256_text(*prompts)
        if key not in self.embeddings:
            texts = joined_texts(prompts, self.generator.samples_per_prompt)
            found = mean_embedding(self.generator.text_encoder, texts)
            self.embeddings[key] = found.double().numpy()
        return self.embeddings[key]

    def source_embeddings(self) -> "np.ndarray":
        """Returns ``[datasets, dim]``: the mean embedding of all prompts of each training dataset;
        the generator's file has them unless its encoder was trained."""
        import numpy as np

        known = self.generator.familiarity
        if known and known.datasets == [source.name for source in self.sources]:
            return known.centres.double().numpy()
        return np.stack([self.mean_embedding(source.prompts) for source in self.sources])

    def nearest_source(self, prompts: Sequence[str]) -> int:
        """Returns the index of the training dataset whose prompts are the most similar to these on
        average."""
        import numpy as np

        means, own = self.source_embeddings(), self.mean_embedding(prompts)  # (N, dim), (dim,)
        return int((means @ own / np.maximum(np.linalg.norm(means, axis=1), 1e-12)).argmax())


class Contestant(ABC):
    """One column of the table."""

    name: ClassVar[str]
    """The column's name in the results and in `--columns`."""
    title: ClassVar[str]
    """The column's header; `{shots}` is replaced by the number of few-shot rows."""
    trains: ClassVar[bool] = False
    """Whether a LoRA is trained for it first."""
    on_demand: ClassVar[bool] = False
    """Whether it is evaluated only if it is asked for, since it is expensive."""
    best: ClassVar[bool] = False
    """Whether only the entry with the highest score counts, in place of the mean. All entries
    answer a few rows first, and the best of them all rows."""
    control: ClassVar[bool] = False
    """Whether it is what the generator gives for wrong prompts."""
    needs_sources: ClassVar[bool] = False
    """Whether it reads the generator's training runs, which may be on another machine."""
    fewest_sources: ClassVar[int] = 1
    """The number of training datasets without which it cannot be evaluated."""
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

    name, title = "mean", "mean"

    def entries(self, target: Target, targets: Sequence[Target]) -> Iterator[Entry]:
        yield _timed(self.setup.mean_adapter)


class NearestAdapter(Contestant):
    """The last adapter of the training dataset whose prompts are the most similar on average."""

    name, title, needs_sources = "nearest", "nearest", True

    def entries(self, target: Target, targets: Sequence[Target]) -> Iterator[Entry]:
        def nearest() -> "Adapter":
            return self.setup.collected(self.setup.nearest_source(target.prompts))

        yield _timed(nearest)


class RidgeRegression(Contestant):
    """A ridge regression from mean prompt embeddings to the last adapters of all training datasets.
    Its penalty is chosen by leaving out each of them in turn. Nothing is trained, so that what the
    generator gains over it is what its training gains."""

    name, title, needs_sources, fewest_sources = "ridge", "ridge", True, 2

    @cached_property
    def regression(self) -> "KernelRidge":
        """Fitted to adapters whose tensors are scaled as the generator learns them, so that small
        matrices count as much as large ones."""
        import torch

        from loragen.core.adapter.ridge import fit_ridge

        generator, count = self.setup.generator, len(self.setup.sources)
        layout, mean, scale = (
            generator.layout,
            generator.mean_adapter,
            generator.normalization.scale,
        )
        gram = torch.zeros(count, count, dtype=torch.float64)
        at_once = self.setup.adapters_at_once

        def block(first: int) -> "Tensor":
            members = range(first, min(first + at_once, count))
            packed = [layout.pack(self.setup.collected(index).tensors) for index in members]
            return torch.stack([((tokens - mean) / scale).flatten() for tokens in packed])

        for i in range(0, count, at_once):
            rows = block(i)  # (n, values)
            for j in range(i, count, at_once):
                products = (rows @ (rows if i == j else block(j)).T).double()
                gram[i : i + len(products), j : j + products.shape[1]] = products
                gram[j : j + products.shape[1], i : i + len(products)] = products.T
        return fit_ridge(self.setup.source_embeddings(), gram.numpy())

    def entries(self, target: Target, targets: Sequence[Target]) -> Iterator[Entry]:
        from loragen.core.adapter.files import Adapter

        regression = self.regression  # fitted once, so that its time does not count

        def predicted() -> "Adapter":
            own = self.setup.mean_embedding(target.prompts)
            total: dict[str, Tensor] = {}
            for index, weight in enumerate(regression.coefficients(own).tolist()):
                for key, tensor in self.setup.collected(index).tensors.items():
                    part = weight * tensor.double()
                    total[key] = total[key] + part if key in total else part
            config = dict(self.setup.generator.adapter_config)
            return Adapter(config, {key: tensor.float() for key, tensor in total.items()})

        yield _timed(predicted)


class ArrowRouter(Contestant):
    """PEFT's Arrow router over the last adapters of all training datasets. It reads no prompts
    beforehand: every token is routed when it is answered."""

    name, title, needs_sources, fewest_sources = "arrow", "arrow", True, 2

    @cached_property
    def routed(self) -> Routed:
        """The same adapters for every dataset, read once."""
        count = len(self.setup.sources)
        return Routed([self.setup.collected(index) for index in range(count)], min(3, count))

    def entries(self, target: Target, targets: Sequence[Target]) -> Iterator[Entry]:
        yield Entry(self.routed)


class BestSingle(Contestant):
    """The last adapter of the training dataset that answers the *tested rows* best: what choosing
    one collected adapter can reach. The nearest one is scored on all rows in any case, so that this
    is never below it."""

    name, title = "best_single", "best single"
    needs_sources = on_demand = best = True

    def entries(self, target: Target, targets: Sequence[Target]) -> Iterator[Entry]:
        nearest = self.setup.nearest_source(target.prompts)
        for index in range(len(self.setup.sources)):
            yield Entry(self.setup.collected(index), seeded=index == nearest)


class MultiTask(Contestant):
    """One LoRA trained on the rows of all training datasets together."""

    name, title = "multi_task", "multi-task"
    trains = on_demand = needs_sources = True

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
        from loragen.core.data.chat import answer_ids, prompt_ids

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


class GeneratedAdapters(Contestant):
    """Adapters generated from unlabelled prompts of the dataset, one for each draw of prompts."""

    name, title = "generated", "generated"

    def entries(self, target: Target, targets: Sequence[Target]) -> Iterator[Entry]:
        generator, options = self.setup.generator, self.setup.options
        _ = generator.text_encoder  # loaded now, so that its time does not count
        for number, prompts in enumerate(draws_of(target, generator, options)):
            with tempfile.TemporaryDirectory() as temporary:
                parent = (options.keep or Path(temporary)) / target.group / target.name
                directory = parent / f"draw-{number}"
                started = time.perf_counter()
                adapter = generator.generate(prompts)
                adapter.save(directory)
                seconds = round(time.perf_counter() - started, 4)
            yield Entry(adapter, seconds)


class Oracle(Contestant):
    """The LoRA trained on the dataset's own labels: an upper bound."""

    name, title = "oracle", "oracle"
    trains = on_demand = needs_sources = True

    def entries(self, target: Target, targets: Sequence[Target]) -> Iterator[Entry]:
        yield self.setup.oracles[target.key].entry()


class OtherPrompts(Contestant):
    """Control: adapters generated from the prompts of other datasets, drawn at random: if they
    answer as well as the generated ones, the generator does not use its prompts."""

    name, title = "other_prompts", "other prompts"
    control = needs_sources = sources_if_alone = True  # several datasets use each other's prompts

    def entries(self, target: Target, targets: Sequence[Target]) -> Iterator[Entry]:
        generator, options = self.setup.generator, self.setup.options
        pool = {source.name: list(source.prompts) for source in self.setup.sources}
        pool |= {one.name: list(one.prompts) for one in targets if one.group == target.group}
        others = [prompts for name, prompts in pool.items() if name != target.name]
        random = Random(f"other prompts:{options.seed}:{target.name}")
        random.shuffle(others)
        for number, own in enumerate(draws_of(target, generator, options)):
            if others:
                prompts = others[number % len(others)]
                drawn = random.sample(prompts, min(len(own), len(prompts)))
                yield _timed(partial(generator.generate, drawn))


class GibberishPrompts(Contestant):
    """Control: adapters generated from the dataset's prompts with random letters in place of their
    letters and digits."""

    name, title, control = "gibberish_prompts", "gibberish", True

    def entries(self, target: Target, targets: Sequence[Target]) -> Iterator[Entry]:
        generator, options = self.setup.generator, self.setup.options
        random = Random(f"gibberish:{options.seed}:{target.name}")
        for own in draws_of(target, generator, options):
            nonsense = [re.sub(r"\w", lambda _: random.choice(ascii_lowercase), one) for one in own]
            yield _timed(partial(generator.generate, nonsense))


class Labelled(Contestant):
    """The LoRA trained on a few labelled rows of the dataset, as the oracle is on all."""

    trains = on_demand = needs_sources = True
    size: ClassVar[int]
    """The number of labelled rows."""

    def entries(self, target: Target, targets: Sequence[Target]) -> Iterator[Entry]:
        yield self.setup.labelled[*target.key, self.size].entry()


def _labelled(size: int) -> type[Labelled]:
    members = {"name": f"labels_{size}", "title": f"{size} labels", "size": size}
    return type(f"Labelled{size}", (Labelled,), members)


LABELLED = tuple(map(_labelled, LABEL_SIZES))
CONTESTANTS: tuple[type[Contestant], ...] = (
    BaseAlone,
    FewShot,
    MeanAdapter,
    NearestAdapter,
    RidgeRegression,
    ArrowRouter,
    MultiTask,
    BestSingle,
    GeneratedAdapters,
    Oracle,
    OtherPrompts,
    GibberishPrompts,
    *LABELLED,
)
"""All contestants, in the order of the table's columns."""
NAMES = tuple(contestant.name for contestant in CONTESTANTS)
ARROW, MULTI_TASK, ORACLE = ArrowRouter.name, MultiTask.name, Oracle.name
GENERATED = GeneratedAdapters.name
BASE, BEST_SINGLE = BaseAlone.name, BestSingle.name
CONTROLS = tuple(contestant.name for contestant in CONTESTANTS if contestant.control)
LABEL_CURVE = {contestant.name: contestant.size for contestant in LABELLED}
"""The number of labelled rows of each column of the label curve."""


def choose(wanted: Sequence[str], also: Iterable[str] = ()) -> list[type[Contestant]]:
    """Returns the contestants named, in the table's order; by default, all that are cheap.

    `also` are further names. `-` and `_` are the same, and a column may be called as the table
    does. Raises UsageError for an unknown name.
    """
    known = {title.replace(" ", "_"): name for name, title in titles(0).items()}
    names = [re.sub(r"[ -]", "_", name.strip()) for name in wanted if name.strip()]
    names = [known.get(re.sub(r"^\d+_shot$", "0-shot", name), name) for name in names]
    for name in names:
        if name not in NAMES:
            raise UsageError(
                f"--columns: unknown column '{name}'.{did_you_mean(name, NAMES)} "
                f"There are: {listing(NAMES)}"
            )
    names = names or [contestant.name for contestant in CONTESTANTS if not contestant.on_demand]
    return [contestant for contestant in CONTESTANTS if contestant.name in {*names, *also}]


def titles(shots: int) -> dict[str, str]:
    """Returns the header of each column."""
    return {one.name: one.title.format(shots=shots) for one in CONTESTANTS}


def _timed(obtain: Callable[[], "Adapter"]) -> Entry:
    started = time.perf_counter()
    adapter = obtain()
    return Entry(adapter, time.perf_counter() - started)
