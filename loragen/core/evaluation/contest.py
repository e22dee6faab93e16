"""The contest of `gen eval`: all contestants answer all datasets' questions on one model, and the
results are means, intervals, significant differences, novelty and costs."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from loragen.core.adapter import KEY_PREFIX
from loragen.core.adapter.files import Adapter, attach_adapter, module_scaling, swap_adapter
from loragen.core.base.load import best_device, load_base, quiet_libraries
from loragen.core.config.schema import GenDataSection, SourceSection
from loragen.core.data.dataset import Dataset
from loragen.core.errors import LoragenError, UsageError
from loragen.core.evaluation.contestants import (
    GENERATED,
    Contestant,
    Entry,
    EvaluationOptions,
    EvaluationSetup,
    MultiTask,
    Oracle,
    draws_of,
)
from loragen.core.evaluation.report import MEASURES
from loragen.core.evaluation.statistics import NoveltyReport, interval, novelty
from loragen.core.evaluation.targets import Target
from loragen.core.evaluation.training import train_multi_task, train_oracles
from loragen.core.generator.model import Generator
from loragen.core.learning.sources import PromptDirectories, TrainingSource, open_source
from loragen.core.lora.evaluate import Scores, evaluate_model
from loragen.core.progress import Progress
from loragen.core.run.directory import SourceRecord

log = logging.getLogger(__name__)

ALL_CHECKPOINTS = 2**31

Submit = Callable[..., Future[Any]]
"""`submit(function, *arguments)` runs `function(setup, *arguments)` in another process, which has
an equal setup."""


@dataclass
class Cell:
    """The scores of one contestant on one dataset, one for each of its entries."""

    scores: list[Scores] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """The time to obtain each adapter; empty if there was nothing to obtain."""

    def values(self, measure: str) -> list[float] | None:
        """Returns a field of `Scores` for each entry; None if one of them lacks it."""
        found = [getattr(score, measure) for score in self.scores]
        return None if None in found else found


@dataclass(frozen=True)
class DatasetScores:
    """A row of the table: one dataset, with a cell for each contestant's name."""

    target: Target
    cells: dict[str, Cell]


def evaluate_generator(
    file: Path,
    targets: Sequence[Target],
    contestants: Sequence[type[Contestant]],
    *,
    options: EvaluationOptions,
    base_model: str | None,
    cache: Path,
    progress: Progress,
    strict: bool,
) -> dict[str, Any]:
    """Evaluates a generator's file; returns the whole comparison as plain data.

    If the generator's training runs cannot be read, the contestants that need them are left out
    with a warning. Raises LoragenError instead if `strict`, or if one of them is trained.
    """
    quiet_libraries()
    generator = Generator.load(file)
    for target in targets:
        draws_of(target, generator, options)  # raises UsageError before anything is trained
    strict = strict or any(one.trains for one in contestants)
    sources: list[TrainingSource] = []
    try:
        datasets = [one for target in targets for one in (target.dataset, target.train) if one]
        sources = training_sources(generator, datasets)
    except LoragenError as error:
        if strict and any(one.reads_sources(len(targets)) for one in contestants):
            raise
        log.warning(
            "the training runs cannot be read, so there is no nearest adapter, no novelty and, for "
            "a single dataset, no random prompts: %s",
            error.problems[0],
        )
    chosen = [one for one in contestants if sources or not one.reads_sources(len(targets))]
    base = load_base(base_model or generator.base_model)
    multi_task, oracles = None, {}
    if MultiTask in chosen:
        multi_task = train_multi_task(sources, base, cache, progress)
    if Oracle in chosen:
        oracles = train_oracles(targets, sources, base, cache, progress)
    base.model.to(best_device())
    setup = EvaluationSetup(base, generator, sources, multi_task, oracles, options)
    return {"generator": str(file), **hold_contest(setup, chosen, targets)}


def training_sources(
    generator: Generator, datasets: Iterable[Dataset] = ()
) -> list[TrainingSource]:
    """Returns the generator's training datasets, with their checkpoints and prompts in training.

    `datasets` are open already, and not read again. Raises LoragenError if a source cannot be read.
    """
    provenance = generator.provenance
    records = [SourceRecord.model_validate(one) for one in provenance.get("source_records", [])]
    trained_on = [one for one in records if not one.held_out]
    found = [
        (SourceSection(checkpoints=one.place, prompts=one.prompts_from), one.count)
        for one in trained_on
        if one.place
    ]
    if not found or len(found) < len(trained_on):  # older files have only the directories
        directories = provenance.get("sources", [])
        found = [(SourceSection(checkpoints=one), ALL_CHECKPOINTS) for one in directories]
    if not found:
        raise UsageError("the generator's file does not name the runs that it was trained on")
    prepared = PromptDirectories(GenDataSection(samples_per_prompt=generator.samples_per_prompt))
    opened = {dataset.location: dataset for dataset in datasets}
    sources = [open_source(section, prepared, count) for section, count in found]
    for source in sources:
        if source.labels:
            source.labels = opened.get(source.labels.location, source.labels)
        if source.prompt_dataset:
            named = source.prompt_dataset
            source.prompt_dataset = opened.get(named.location, named)
        _ = source.prompts  # raises LoragenError if they cannot be read
    return sources


def hold_contest(
    setup: EvaluationSetup,
    contestants: Sequence[type[Contestant]],
    targets: Sequence[Target],
    submit: Submit | None = None,
) -> dict[str, Any]:
    """Scores every contestant on every dataset and measures novelty; returns the results document.

    The contest runs in this process, or in the processes of `submit`, with the same result.
    """
    report: NoveltyReport | None = None
    if submit is None:
        outcomes = score_contestants(setup, contestants, targets, targets)
        report = novelty(setup, targets) if setup.sources else None
    else:
        # Each dataset is compared with many others, and embedded once, in one of the processes.
        compared = [target.prompts for target in targets]
        compared += [source.prompts for source in setup.sources]
        embedded = [submit(_embeddings, prompts) for prompts in compared]
        novelties = submit(novelty, targets) if setup.sources else None
        known = {key: mean for one in embedded for key, mean in one.result().items()}
        parts = [submit(_score_one, contestants, one, targets, known) for one in targets]
        outcomes = []
        for part in parts:
            outcomes.append(part.result())
            _log(outcomes[-1], len(outcomes), len(targets))
        report = novelties.result() if novelties else None
    return results_document(outcomes, setup, report)


def _embeddings(setup: EvaluationSetup, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    setup.mean_embedding(prompts)
    return setup.embeddings


def _score_one(
    setup: EvaluationSetup,
    contestants: Sequence[type[Contestant]],
    target: Target,
    targets: Sequence[Target],
    embeddings: Mapping[str, np.ndarray],
) -> DatasetScores:
    setup.embeddings.update(embeddings)
    return score_contestants(setup, contestants, [target], targets)[0]


def score_contestants(
    setup: EvaluationSetup,
    contestants: Sequence[type[Contestant]],
    targets: Sequence[Target],
    among: Sequence[Target],
) -> list[DatasetScores]:
    """Returns every contestant's scores on `targets`; the base model is left unchanged.

    `among` are all datasets of the evaluation, of which `targets` may be a part. Raises
    LoragenError if an adapter does not fit the base model, UsageError if a dataset has too few
    prompts.
    """
    entrants = [contestant(setup) for contestant in contestants]
    model = attach_adapter(setup.base.model, setup.mean_adapter(), "the mean adapter")
    outcomes = []
    try:
        for target in targets:
            cells: dict[str, Cell] = {}
            for entrant in entrants:
                cells[entrant.name] = cell = Cell()
                for entry in entrant.entries(target, among):
                    cell.scores.append(_score(model, setup, target, entry))
                    if entry.seconds is not None:
                        cell.seconds.append(entry.seconds)
            outcomes.append(DatasetScores(target, cells))
            _log(outcomes[-1], len(outcomes), len(targets))
    finally:
        model.unload()
    return outcomes


def _score(model: Any, setup: EvaluationSetup, target: Target, entry: Entry) -> Scores:
    """Scores an entry on a model with an adapter attached, whose weights are replaced."""
    with ExitStack() as stack:
        if entry.adapter is None:
            stack.enter_context(model.disable_adapter())
        else:
            adapter = rescaled(entry.adapter, setup.generator.adapter_config)
            swap_adapter(model, adapter, f"an adapter for {target.name}")
        return evaluate_model(
            model,
            setup.base.tokenizer,
            target.rows if entry.rows is None else entry.rows,
            setup.options.batch_size,
            choices=setup.options.choices,
            closed=target.closed,
        )


def rescaled(adapter: Adapter, config: Mapping[str, Any]) -> Adapter:
    """Returns an adapter with the same ΔW under the scaling of `config`, which an attached model
    keeps when its weights are replaced; the adapter itself if both scalings agree."""
    ratios = {
        key: module_scaling(adapter.config, module) / module_scaling(config, module)
        for key in adapter.tensors
        for module, _, factor in [key.removeprefix(KEY_PREFIX).rpartition(".lora_")]
        if factor.startswith("B")
    }
    if all(ratio == 1 for ratio in ratios.values()):
        return adapter
    return Adapter(
        dict(config),
        {key: tensor * ratios.get(key, 1.0) for key, tensor in adapter.tensors.items()},
    )


def _log(outcome: DatasetScores, number: int, total: int) -> None:
    accuracies = ", ".join(
        f"{name} {fmean(score.exact_match for score in cell.scores):.2f}"
        for name, cell in outcome.cells.items()
        if name in ("base", GENERATED)
    )
    log.info("%d/%d %s: %s", number, total, outcome.target.name, accuracies)


def results_document(
    outcomes: Sequence[DatasetScores], setup: EvaluationSetup, report: NoveltyReport | None
) -> dict[str, Any]:
    """Returns the content of results.json, with unweighted means over each group's datasets."""
    groups: dict[str, list[DatasetScores]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.target.group, []).append(outcome)
    summaries = {group: _summary(members) for group, members in groups.items()}
    keys = dict.fromkeys(chain.from_iterable(summaries.values()))
    options = asdict(setup.options)
    del options["keep"], options["prompts"]
    return {
        "base_model": setup.base.name,
        "columns": list(outcomes[0].cells),
        **{key: {group: of[key] for group, of in summaries.items() if key in of} for key in keys},
        "seconds": _seconds(outcomes, setup.sources),
        "multi_task": {"steps": setup.multi_task.steps} if setup.multi_task else None,
        "novelty": report.as_dict() if report else None,
        "options": options,
        "datasets": [_dataset_document(outcome, setup, report) for outcome in outcomes],
    }


def _summary(outcomes: Sequence[DatasetScores]) -> dict[str, Any]:
    """Returns {measure: {column: value}} of one dataset, or averaged over several, without measures
    that some dataset lacks. A generated column adds its interval and the columns outside of it,
    both rounded as printed."""
    columns = list(outcomes[0].cells)
    summary: dict[str, Any] = {}
    for measure in MEASURES:
        # {column: [datasets][draws]}
        values = {
            name: [outcome.cells[name].values(measure.field) for outcome in outcomes]
            for name in columns
        }
        if not any(None in of for of in values.values()):
            summary[measure.name] = {
                name: round(fmean(fmean(draws or ()) for draws in of), 4)
                for name, of in values.items()
            }
    if GENERATED in columns:
        draws = [outcome.cells[GENERATED].values("exact_match") or [] for outcome in outcomes]
        found = interval(draws, [len(outcome.target.rows) for outcome in outcomes])
        low, high = round(found.low, 4), round(found.high, 4)
        others = {name: of for name, of in summary["accuracy"].items() if name != GENERATED}
        summary["interval"] = {GENERATED: [low, high]}
        summary["beats"] = [name for name, value in others.items() if value < low]
        summary["beaten_by"] = [name for name, value in others.items() if value > high]
    return summary


def _dataset_document(
    outcome: DatasetScores, setup: EvaluationSetup, report: NoveltyReport | None
) -> dict[str, Any]:
    target, generated = outcome.target, outcome.cells.get(GENERATED)
    novelties = report.novelties if report else []
    new = next((one for one in novelties if one.target.key == target.key), None)
    return {
        "name": target.name,
        "group": target.group,
        "source": target.dataset.location,
        "rows": len(target.rows),
        "prompts": len(draws_of(target, setup.generator, setup.options)[0]),
        "prompts_from": target.prompts_from,
        **_summary([outcome]),
        "draws": generated.values("exact_match") if generated else None,
        "novelty": {"nearest": new.nearest, "to_nearest": new.to_nearest, "to_mean": new.to_mean}
        if new
        else None,
    }


def _seconds(
    outcomes: Sequence[DatasetScores], sources: Sequence[TrainingSource]
) -> dict[str, Any]:
    """Returns the mean times to train one of the generator's training adapters, to generate an
    adapter, and to obtain the adapter of each column."""
    obtain = {}
    for name in outcomes[0].cells:
        seconds = [second for outcome in outcomes for second in outcome.cells[name].seconds]
        obtain[name] = round(fmean(seconds), 4) if seconds else None
    runs = [source.run for source in sources if source.run]
    known = [run.manifest.seconds for run in runs if run.manifest.seconds]
    complete = known and len(runs) == len(sources)  # some adapters may have no run
    trained, generated = round(fmean(known), 3) if complete else None, obtain.get(GENERATED)
    return {
        "train_adapter": trained,
        "generate_adapter": generated,
        "ratio": round(trained / generated, 1) if trained and generated else None,
        "obtain": obtain,
    }
