"""The demo's table: the contest of `gen eval`, on the three splits of the made-up world."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loragen.core.analysis.gram import evenly
from loragen.core.base_models import load_base
from loragen.core.config import DEMO
from loragen.core.data.answers import closed_answers
from loragen.core.data.rows import read_rows
from loragen.core.evaluation.bench import Bench, Options, Trained, training_sources
from loragen.core.evaluation.columns import COLUMNS
from loragen.core.evaluation.contest import hold
from loragen.core.evaluation.novelty import novelty
from loragen.core.evaluation.results import document
from loragen.core.evaluation.targets import Target
from loragen.core.evaluation.training import best_checkpoint
from loragen.core.generator.model import Generator
from loragen.demo.settings import PROMPTS
from loragen.demo.workers import Done
from loragen.demo.world import Pair

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


def contest(
    generator: Generator,
    targets: Sequence[Target],
    multi_task: Done,
    oracles: Sequence[Done],
    keep: Path,
) -> dict[str, Any]:
    """The results on all targets, every column; `oracles` in the order of the targets. The
    generated adapters are kept below `keep`."""
    best = best_checkpoint(multi_task.directory)
    sources = [
        replace(source, checkpoints=evenly(source.checkpoints, CHECKPOINTS))
        for source in training_sources(generator)
    ]
    bench = Bench(
        base=load_base(DEMO),
        generator=generator,
        sources=sources,
        multi_task=Trained(best, multi_task.seconds, multi_task.steps),
        oracles={
            one.key: Trained(done.directory, done.seconds, done.steps)
            for one, done in zip(targets, oracles, strict=True)
        },
        options=Options(prompts=PROMPTS, choices=False, keep=keep),
    )
    outcomes = hold(bench, COLUMNS, targets)
    told = document(outcomes, bench, novelty(bench, targets))
    told["novelty"]["checkpoints_of_each"] = CHECKPOINTS
    told["seconds"]["trained"] = "trained side by side, one thread each"
    return told
