"""The contestants: each gives, for a dataset, the adapter that answers its questions.

`columns.COLUMNS` lists them; a new one is a class here, or anywhere, and a line there.
"""

import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, Protocol

from loragen.core.adapters import Adapter, read_adapter
from loragen.core.checkpoints import read_checkpointed_adapter
from loragen.core.data.formats import Turn
from loragen.core.data.rows import Row
from loragen.core.data.tokenize import answer_ids, prompt_ids
from loragen.core.evaluation.bench import Bench, Trained
from loragen.core.evaluation.targets import Target
from loragen.core.generator.inference.infer import infer

log = logging.getLogger(__name__)


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
                seconds = infer(self.bench.generator, prompts, directory).seconds
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
