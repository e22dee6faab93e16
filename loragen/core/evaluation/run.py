"""Evaluate a generator: load, train what is wanted, hold the contest, measure novelty."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loragen.core.base_models import load_base
from loragen.core.devices import best_device
from loragen.core.errors import LoragenError
from loragen.core.evaluation.bench import Bench, Options, drawn, training_sources
from loragen.core.evaluation.columns import MULTI_TASK, ORACLE, Column
from loragen.core.evaluation.contest import hold
from loragen.core.evaluation.novelty import novelty
from loragen.core.evaluation.results import document
from loragen.core.evaluation.targets import Target
from loragen.core.evaluation.training import train_multi_task, train_oracles
from loragen.core.generator.collections.sources import Collection
from loragen.core.generator.model import Generator
from loragen.core.progress import Progress
from loragen.core.quiet import quiet_libraries

log = logging.getLogger(__name__)


def evaluate_generator(
    file: Path,
    targets: Sequence[Target],
    columns: Sequence[Column],
    *,
    options: Options,
    base_model: str | None,
    cache: Path,
    progress: Progress,
    strict: bool,
) -> dict[str, Any]:
    """The whole comparison as plain data (see `results.document`).

    Where the training runs are not there any more, the columns that read them are left out with a
    warning, unless `strict` or one of them was to be trained: then LoragenError is raised.
    """
    quiet_libraries()
    generator = Generator.load(file)
    for target in targets:
        drawn(target, generator, options)  # too few prompts are told before anything is trained
    strict = strict or any(column.trains for column in columns)
    sources = _sources(
        generator, strict and any(column.reads_sources(len(targets)) for column in columns)
    )
    left = [column for column in columns if sources or not column.reads_sources(len(targets))]
    names = [column.name for column in left]
    base = load_base(base_model or generator.base_model)
    multi_task = train_multi_task(sources, base, cache, progress) if MULTI_TASK in names else None
    oracles = train_oracles(targets, sources, base, cache, progress) if ORACLE in names else {}
    base.model.to(best_device())
    bench = Bench(base, generator, sources, multi_task, oracles, options)
    outcomes = hold(bench, left, targets)
    spread = novelty(bench, targets) if sources else None
    return {"generator": str(file), **document(outcomes, bench, spread)}


def _sources(generator: Generator, required: bool) -> list[Collection]:
    try:
        return training_sources(generator)
    except LoragenError as error:
        if required:
            raise
        log.warning(
            "without the training runs there is no nearest adapter, no novelty and, for a single "
            "dataset, no random prompts: %s",
            error.problems[0],
        )
        return []
