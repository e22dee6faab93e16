"""The demo's table: the contest of `gen eval`, on the three splits of the made-up world.

The targets are divided among the workers, and the outcomes are those of one process, bit for bit.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from loragen.core.analysis.gram import evenly
from loragen.core.data.rows import closed_answers, read_rows
from loragen.core.evaluation.contest import DatasetScores, hold, in_brief, results_document
from loragen.core.evaluation.contestants import (
    COLUMNS,
    Bench,
    EvaluationOptions,
    Trained,
    training_sources,
)
from loragen.core.evaluation.statistics import Spread, novelty
from loragen.core.evaluation.targets import Target
from loragen.core.evaluation.training import best_checkpoint
from loragen.core.generator.model import Generator
from loragen.core.learning.sources import TrainingSource
from loragen.demo.settings import PROMPTS
from loragen.demo.workers import Done, Workers, base
from loragen.demo.world import Pair

log = logging.getLogger(__name__)

CHECKPOINTS = 5  # of a dataset, evenly spaced, that novelty looks at: all 50 would take 10 s


def target(split: str, pair: Pair, train_file: Path, test_file: Path) -> Target:
    """A dataset to make an adapter for. The generator sees prompts of the test creatures; the
    labelled rows of the training creatures are for the oracle and the k-shot prompts alone."""
    rows, train_rows = read_rows(test_file), read_rows(train_file)
    return Target(
        group=split,
        name=pair.name,
        source=str(test_file),
        rows=rows,
        prompts=[row.prompt for row in rows],
        prompts_from="tested rows",
        train_source=train_file,
        train_rows=train_rows,
        closed=closed_answers([*train_rows, *rows]),
    )


@dataclass(frozen=True)
class Contest:
    """What a process has to know to hold any part of it."""

    generator: Path
    targets: Sequence[Target]
    multi_task: Trained
    oracles: Mapping[tuple[str, str], Trained]
    keep: Path
    """The generated adapters are kept below it."""

    def bench(self, centres: dict[str, np.ndarray] | None = None) -> Bench:
        """In this process; with the centres that are known."""
        generator, sources = _learned(self.generator)
        options = EvaluationOptions(prompts=PROMPTS, choices=False, keep=self.keep)
        return Bench(
            base(), generator, sources, self.multi_task, self.oracles, options, centres or {}
        )


def contest(
    workers: Workers,
    generator: Path,
    targets: Sequence[Target],
    multi_task: Done,
    oracles: Sequence[Done],
    keep: Path,
) -> dict[str, Any]:
    """The results on all targets, every column; `oracles` in the order of the targets. The
    generated adapters are kept below `keep`."""
    best = best_checkpoint(multi_task.directory)
    whole = Contest(
        generator,
        targets,
        Trained(best, multi_task.seconds, multi_task.steps),
        {
            one.key: Trained(done.directory, done.seconds, done.steps)
            for one, done in zip(targets, oracles, strict=True)
        },
        keep,
    )
    bench = whole.bench()
    compared = [one.prompts for one in targets]
    compared += [source.prompts for source in bench.sources]
    centres = [workers.submit(_centre, generator, prompts) for prompts in compared]
    spread = workers.submit(_novelty, whole)
    known = {key: centre for future in centres for key, centre in future.result().items()}
    told = results_document(_outcomes(workers, whole, known), bench, spread.result())
    told["novelty"]["checkpoints_of_each"] = CHECKPOINTS
    told["seconds"]["trained"] = "trained side by side, one thread each"
    return told


def _outcomes(
    workers: Workers, whole: Contest, centres: dict[str, np.ndarray]
) -> list[DatasetScores]:
    """In the order of the targets, each a job."""
    count = len(whole.targets)
    parts = [workers.submit(_outcome, whole, centres, number) for number in range(count)]
    outcomes = []
    for number, part in enumerate(parts, start=1):
        outcomes.append(part.result())
        log.info("%d/%d %s", number, count, in_brief(outcomes[-1]))
    return outcomes


@cache
def _learned(file: Path) -> tuple[Generator, list[TrainingSource]]:
    """The generator and what it learned from, loaded once a process."""
    generator = Generator.load(file)
    sources = [
        replace(source, checkpoints=evenly(source.checkpoints, CHECKPOINTS))
        for source in training_sources(generator)
    ]
    return generator, sources


def _centre(generator: Path, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """As `Bench.centres` has it: every target is compared with many datasets, of which none is to
    be embedded by each worker."""
    bench = Bench(base(), _learned(generator)[0])
    bench.centre(prompts)
    return bench.centres


def _outcome(whole: Contest, centres: dict[str, np.ndarray], number: int) -> DatasetScores:
    """Of one target."""
    bench = whole.bench(centres)
    (outcome,) = hold(bench, COLUMNS, [whole.targets[number]], among=whole.targets)
    return outcome


def _novelty(whole: Contest) -> Spread:
    return novelty(whole.bench(), whole.targets)
