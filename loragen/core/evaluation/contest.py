"""The contest: every contestant answers every dataset's questions, on one model.

From scores to what is told: means, intervals, who beats whom, what it cost. Plain data.

Evaluate a generator: load, train what is wanted, hold the contest, measure novelty.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from loragen.core.adapter.files import Adapter, attach_adapter, module_scaling, swap_adapter
from loragen.core.base.load import best_device, load_base, quiet_libraries
from loragen.core.errors import LoragenError
from loragen.core.evaluation.contestants import (
    GENERATED,
    MULTI_TASK,
    ORACLE,
    Bench,
    Column,
    Contestant,
    Entry,
    EvaluationOptions,
    contestant_class,
    drawn,
    training_sources,
)
from loragen.core.evaluation.report import MEASURES
from loragen.core.evaluation.statistics import Spread, interval, novelty
from loragen.core.evaluation.targets import Target
from loragen.core.evaluation.training import train_multi_task, train_oracles
from loragen.core.generator.model import Generator
from loragen.core.learning.sources import TrainingSource
from loragen.core.lora.evaluate import Scores, evaluate
from loragen.core.progress import Progress
from loragen.core.run.directory import LoraManifest, read_manifest, run_directory_of

log = logging.getLogger(__name__)


@dataclass
class Cell:
    """What one contestant reached on one dataset: a score for each of its entries."""

    scores: list[Scores] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """To obtain each adapter; none where nothing had to be obtained."""

    def values(self, measure: str) -> list[float] | None:
        """A measure's value for each entry; None where the dataset does not have it."""
        found = [getattr(score, measure) for score in self.scores]
        return None if None in found else found


@dataclass(frozen=True)
class DatasetScores:
    """A row of the table: one dataset."""

    target: Target
    cells: dict[str, Cell]


def hold(
    bench: Bench,
    columns: Sequence[Column],
    targets: Sequence[Target],
    among: Sequence[Target] | None = None,
) -> list[DatasetScores]:
    """Every column's score on every dataset; the base is handed back as it was.

    `among` are all datasets of the evaluation, where `targets` are only a part of them: parts held
    one by one have the outcomes of the whole.

    Raises LoragenError where an adapter does not fit the base, UsageError where a dataset has too
    few prompts.
    """
    contestants: dict[str, Contestant] = {
        column.name: contestant_class(column)(bench) for column in columns
    }
    model = attach_adapter(bench.base.model, bench.mean_adapter(), "the mean adapter")
    outcomes = []
    try:
        for number, target in enumerate(targets, start=1):
            cells = {
                name: _cell(model, bench, target, contestant.entries(target, among or targets))
                for name, contestant in contestants.items()
            }
            outcomes.append(DatasetScores(target, cells))
            log.info("%d/%d %s", number, len(targets), in_brief(outcomes[-1]))
    finally:
        model.unload()
    return outcomes


def _cell(model: Any, bench: Bench, target: Target, entries: Iterable[Entry]) -> Cell:
    cell = Cell()
    for entry in entries:
        cell.scores.append(score(model, bench, target, entry))
        if entry.seconds is not None:
            cell.seconds.append(entry.seconds)
    return cell


def score(model: Any, bench: Bench, target: Target, entry: Entry) -> Scores:
    """An entry on one model with an adapter attached, whose weights are swapped."""
    rows = target.rows if entry.rows is None else entry.rows
    with ExitStack() as stack:
        if entry.adapter is None:
            stack.enter_context(model.disable_adapter())
        else:
            adapter = scaled_as(entry.adapter, bench.generator.adapter_config)
            swap_adapter(model, adapter, f"an adapter for {target.name}")
        return evaluate(
            model,
            bench.base.tokenizer,
            rows,
            bench.options.batch_size,
            choices=bench.options.choices,
            closed=target.closed,
        )


def scaled_as(adapter: Adapter, config: Mapping[str, Any]) -> Adapter:
    """The same ΔW under the scaling of `config`: only weights are swapped, and the model keeps the
    alpha that it was attached with. Where both agree, the adapter itself."""
    ratios = {
        key: module_scaling(adapter.config, module) / module_scaling(config, module)
        for key in adapter.tensors
        for module, _, factor in [key.removeprefix("base_model.model.").rpartition(".lora_")]
        if factor.startswith("B")
    }
    if all(ratio == 1 for ratio in ratios.values()):
        return adapter
    return Adapter(
        dict(config),
        {key: tensor * ratios.get(key, 1.0) for key, tensor in adapter.tensors.items()},
    )


def in_brief(outcome: DatasetScores) -> str:
    """One line, for whoever waits."""
    means = {
        name: fmean(score.exact_match for score in cell.scores)
        for name, cell in outcome.cells.items()
        if name in ("base", GENERATED)
    }
    figures = ", ".join(f"{name} {value:.2f}" for name, value in means.items())
    return f"{outcome.target.name}: {figures}"


def results_document(
    outcomes: Sequence[DatasetScores], bench: Bench, spread: Spread | None
) -> dict[str, Any]:
    """What results.json holds. Averages are over a group's datasets, each weighing the same."""
    groups: dict[str, list[DatasetScores]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.target.group, []).append(outcome)
    summaries = {group: _summary(members) for group, members in groups.items()}
    keys = dict.fromkeys(chain.from_iterable(summaries.values()))
    options = asdict(bench.options)
    del options["keep"], options["prompts"]
    return {
        "base_model": bench.base.name,
        "columns": list(outcomes[0].cells),
        **{key: {group: of[key] for group, of in summaries.items() if key in of} for key in keys},
        "seconds": _seconds(outcomes, bench.sources),
        "multi_task": {"steps": bench.multi_task.steps} if bench.multi_task else None,
        "novelty": spread.as_dict() if spread else None,
        "options": options,
        "datasets": [_row(outcome, bench, spread) for outcome in outcomes],
    }


def _summary(outcomes: Sequence[DatasetScores]) -> dict[str, Any]:
    """Of one dataset, or averaged over several: a measure that some dataset lacks is left out."""
    columns = list(outcomes[0].cells)
    told: dict[str, Any] = {}
    for measure in MEASURES:
        of = {
            name: _values([outcome.cells[name] for outcome in outcomes], measure.field)
            for name in columns
        }
        if None not in of.values():
            told[measure.name] = {
                name: round(fmean(map(fmean, values or ())), 4) for name, values in of.items()
            }
    if GENERATED in columns:
        told |= _claims(outcomes, told["accuracy"])
    return told


def _claims(outcomes: Sequence[DatasetScores], accuracy: Mapping[str, float]) -> dict[str, Any]:
    """The interval of what was generated; a column is beaten that lies below all of it. Compared
    as they are printed: rounding is no victory."""
    values = _values([outcome.cells[GENERATED] for outcome in outcomes], "exact_match")
    rows = [len(outcome.target.rows) for outcome in outcomes]
    low, high = (round(bound, 4) for bound in interval(values or [], rows)[1:])
    others = {name: value for name, value in accuracy.items() if name != GENERATED}
    return {
        "interval": {GENERATED: [low, high]},
        "beats": [name for name, value in others.items() if value < low],
        "beaten_by": [name for name, value in others.items() if value > high],
    }


def _values(cells: Sequence[Cell], field: str) -> list[list[float]] | None:
    """``[datasets][draws]`` of a measure; None where some dataset does not have it."""
    found = [cell.values(field) for cell in cells]
    return [values for values in found if values is not None] if None not in found else None


def _row(outcome: DatasetScores, bench: Bench, spread: Spread | None) -> dict[str, Any]:
    target = outcome.target
    new = [one for one in spread.novelties if one.target == target] if spread else []
    generated = outcome.cells.get(GENERATED)
    return {
        "name": target.name,
        "group": target.group,
        "source": target.source,
        "rows": len(target.rows),
        "prompts": len(bench.draws(target)[0]),
        "prompts_from": target.prompts_from,
        **_summary([outcome]),
        "draws": generated.values("exact_match") if generated else None,
        "novelty": {"nearest": new[0].nearest, "to_nearest": new[0].to_nearest,
                    "to_mean": new[0].to_mean} if new else None,
    }  # fmt: skip


def _seconds(
    outcomes: Sequence[DatasetScores], sources: Sequence[TrainingSource]
) -> dict[str, Any]:
    """To obtain an adapter, the mean over the datasets, and what training costs more."""
    obtain = {}
    for name in outcomes[0].cells:
        seconds = [second for outcome in outcomes for second in outcome.cells[name].seconds]
        obtain[name] = round(fmean(seconds), 4) if seconds else None
    trained, made = _training_seconds(sources), obtain.get(GENERATED)
    return {
        "train_adapter": trained,
        "generate_adapter": made,
        "ratio": round(trained / made, 1) if trained and made else None,
        "obtain": obtain,
    }


def _training_seconds(sources: Sequence[TrainingSource]) -> float | None:
    """Of one of the generator's training adapters, the mean, as their manifests say."""
    try:
        runs = [run_directory_of(source.checkpoints[0]) for source in sources]
        seconds = [read_manifest(run, LoraManifest).seconds for run in runs]
    except LoragenError:  # adapters without a run
        return None
    known = [second for second in seconds if second]
    return round(fmean(known), 3) if known else None


def evaluate_generator(
    file: Path,
    targets: Sequence[Target],
    columns: Sequence[Column],
    *,
    options: EvaluationOptions,
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
    return {"generator": str(file), **results_document(outcomes, bench, spread)}


def _sources(generator: Generator, required: bool) -> list[TrainingSource]:
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
