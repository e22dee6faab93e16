"""The contest of `gen eval`: all contestants answer all datasets' questions on one model, and the
results are means, intervals, significant differences, novelty and costs."""

import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from heapq import nlargest
from pathlib import Path
from statistics import fmean
from typing import Any

from loragen.core.adapter import KEY_PREFIX
from loragen.core.adapter.checks import module_scaling
from loragen.core.adapter.files import Adapter, attach_adapter, swap_adapter, write_adapter
from loragen.core.base.load import best_device, load_base, quiet_libraries
from loragen.core.config.schema import GenDataSection, SourceSection
from loragen.core.data.chat import set_template_kwargs
from loragen.core.data.dataset import Dataset, Row
from loragen.core.data.tokenize import usable_rows
from loragen.core.errors import LoragenError, UsageError, counted, first_line, listing
from loragen.core.evaluation.contestants import (
    BASE,
    GENERATED,
    Contestant,
    Entry,
    EvaluationOptions,
    EvaluationSetup,
    Labelled,
    MultiTask,
    Oracle,
    Routed,
    TrainedAdapter,
    draws_of,
)
from loragen.core.evaluation.novelty import Novelty, novelty
from loragen.core.evaluation.statistics import bits_of, summaries, summary
from loragen.core.evaluation.targets import Target
from loragen.core.evaluation.training import train_labelled, train_multi_task, train_oracles
from loragen.core.generator.model import Generator
from loragen.core.learning.sources import PromptDirectories, TrainingSource, open_source
from loragen.core.lora.evaluate import Scores, TestRows
from loragen.core.progress import Progress
from loragen.core.run.directory import MANIFEST, GeneratorManifest, SourceRecord, read_manifest

log = logging.getLogger(__name__)

ROUTED_ROWS = 8
"""Rows answered at once by several adapters: PEFT's router computes the output of all of them for
every token."""
TARGETS_A_TASK = 4
"""Datasets that a process scores at a time: attaching all collected adapters to the router takes
longer than answering one dataset with it."""

FIRST_ROWS, FINALISTS = 10, 4
"""Where the best of many entries counts, all of them answer so many tested rows, and so many of
them, those that are `seeded` and then the best, answer all rows."""

Submit = Callable[..., Future[Any]]
"""`submit(function, *arguments)` runs `function(setup, *arguments)` in another process, which has
an equal setup."""


@dataclass
class Cell:
    """The scores of one contestant on one dataset, one for each of its entries."""

    scores: list[Scores] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """The time to obtain each adapter; empty if there was nothing to obtain."""

    def mean(self, measure: str) -> float | None:
        """Returns the mean of a field of `Scores` over the entries; None if one of them lacks
        it."""
        found = [getattr(score, measure) for score in self.scores]
        return None if None in found else fmean(found)

    def keep_best(self) -> None:
        """Keeps the entry with the most exact matches, among equals that of the lowest loss."""
        if self.scores:
            self.scores = [max(self.scores, key=quality)]


def quality(score: Scores) -> tuple[float, float]:
    """Returns what the best of several scores is the largest in."""
    return score.exact_match, -score.loss


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
    trust_remote_code: bool = False,
    skip_bad_rows: bool = False,
    cache: Path,
    progress: Progress,
    strict: bool,
    oracle_dirs: Sequence[Path] = (),
    multi_task_steps: int | None = None,
) -> dict[str, Any]:
    """Evaluates a generator's file; returns the whole comparison as plain data.

    `multi_task_steps` limits each training of the multi-task LoRA. An oracle is not trained again
    if its run is in one of `oracle_dirs`, or beside the generator's training runs. If those cannot
    be read, or are too few, the contestants that need them are left out with a warning. Raises
    LoragenError instead if `strict`, or if one of them is trained.
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
            "the training runs cannot be read, so columns that need them and novelty are left out: "
            "%s",
            error.problems[0],
        )
    if seen := trained_on(generator, sources, targets):
        log.warning(
            "%s: among the training datasets of the generator: the results do not show what it "
            "does for a new dataset",
            listing(seen, 5),
        )
    chosen = [one for one in contestants if sources or not one.reads_sources(len(targets))]
    if sources and (few := [one for one in chosen if len(sources) < one.fewest_sources]):
        problem = "; ".join(
            f"{one.name} needs {one.fewest_sources} training datasets" for one in few
        )
        if strict:
            raise UsageError(f"{problem}; the generator has {len(sources)}")
        log.warning("%s and is left out; the generator has %d", problem, len(sources))
        chosen = [one for one in chosen if one not in few]
    base = load_base(base_model or generator.base_model, trust_remote_code=trust_remote_code)
    set_template_kwargs(base.tokenizer, generator.chat_template_kwargs)
    targets = [
        replace(one, rows=usable_rows(base.tokenizer, one.dataset, one.rows, skip_bad_rows))
        for one in targets
    ]
    multi_task, oracles, labelled = None, {}, {}
    if MultiTask in chosen:
        multi_task = train_multi_task(sources, base, cache, progress, multi_task_steps)
    if Oracle in chosen:
        oracles = train_oracles(targets, sources, base, cache, progress, oracle_dirs)
    if sizes := [one.size for one in chosen if issubclass(one, Labelled)]:
        labelled = train_labelled(
            targets, sizes, sources, base, cache, progress, oracle_dirs, options.seed
        )
    base.model.to(best_device())
    setup = EvaluationSetup(base, generator, sources, multi_task, oracles, labelled, options)
    results = {"generator": str(file), **hold_contest(setup, chosen, targets)}
    if multi_task:
        results["multi_task"]["generator_seconds"] = seconds = _training_seconds(file)
        if seconds and multi_task.seconds < seconds:
            log.warning(
                "multi_task: all its trainings took %.0f s, less than the %.0f s of the "
                "generator's: it may need more steps",
                multi_task.seconds,
                seconds,
            )
    return results


def _training_seconds(file: Path) -> float | None:
    """Returns the time of a generator's training; None if its manifest is not there."""
    homes = [home for home in file.absolute().parents[:3] if (home / MANIFEST).is_file()]
    try:
        return read_manifest(homes[0], GeneratorManifest).seconds if homes else None
    except LoragenError:
        return None


def training_sources(
    generator: Generator, datasets: Iterable[Dataset] = ()
) -> list[TrainingSource]:
    """Returns the generator's training datasets, with their checkpoints and prompts in training.

    `datasets` are open already, and not read again. Raises LoragenError if a source cannot be read.
    """
    provenance = generator.provenance
    records = [SourceRecord.model_validate(one) for one in provenance.get("source_records", [])]
    learned = [one for one in records if not one.held_out]
    if not learned:
        raise UsageError("the generator's file does not name the runs that it was trained on")
    prepared = PromptDirectories(GenDataSection(samples_per_prompt=generator.samples_per_prompt))
    opened = {dataset.location: dataset for dataset in datasets}
    sources = [
        open_source(
            SourceSection(checkpoints=one.place, prompts=one.prompts_from), prepared, one.count
        )
        for one in learned
    ]
    for source in sources:
        if source.labels:
            source.labels = opened.get(source.labels.location, source.labels)
        if source.prompt_dataset:
            named = source.prompt_dataset
            source.prompt_dataset = opened.get(named.location, named)
        _ = source.prompts  # raises LoragenError if they cannot be read
    return sources


def trained_on(
    generator: Generator, sources: Sequence[TrainingSource], targets: Sequence[Target]
) -> list[str]:
    """Returns the names of the targets of which a split is a training dataset of the generator, by
    its name, or its place if the `sources` can be read."""
    places = {source.labels.location for source in sources if source.labels}
    return [
        target.name
        for target in targets
        if target.name in generator.datasets
        or places & {split.location for split in (target.dataset, target.train) if split}
    ]


def hold_contest(
    setup: EvaluationSetup,
    contestants: Sequence[type[Contestant]],
    targets: Sequence[Target],
    submit: Submit | None = None,
) -> dict[str, Any]:
    """Scores every contestant on every dataset and measures novelty; returns the results document.

    The contest runs in this process, or in the processes of `submit`, with the same result.
    """
    report: Novelty | None = None
    if submit is None:
        outcomes = score_contestants(setup, contestants, targets, targets)
        report = novelty(setup, targets) if setup.sources else None
    else:
        novelties = submit(novelty, targets) if setup.sources else None
        parts = [
            submit(score_contestants, contestants, targets[first : first + TARGETS_A_TASK], targets)
            for first in range(0, len(targets), TARGETS_A_TASK)
        ]
        outcomes = []
        for part in parts:
            for outcome in part.result():
                outcomes.append(outcome)
                accuracies = (
                    f"{name} {cell.mean('exact_match'):.2f}"
                    for name, cell in outcome.cells.items()
                    if name in (BASE, GENERATED)
                )
                done, name = len(outcomes), outcome.target.name
                log.info("%d/%d %s: %s", done, len(targets), name, ", ".join(accuracies))
        report = novelties.result() if novelties else None
    return results_document(outcomes, setup, report)


def score_contestants(
    setup: EvaluationSetup,
    contestants: Sequence[type[Contestant]],
    targets: Sequence[Target],
    among: Sequence[Target],
) -> list[DatasetScores]:
    """Returns every contestant's scores on `targets`; the base model is left unchanged.

    `among` are all datasets of the evaluation, of which `targets` may be a part. A contestant that
    has nothing to enter for some dataset is left out. Raises LoragenError if an adapter does not
    fit the base model, UsageError if a dataset has too few prompts.
    """
    options, tokenizer = setup.options, setup.base.tokenizer
    tests = [
        TestRows(tokenizer, target.rows, target.closed or [], options.ignore_final_punctuation)
        for target in targets
    ]
    for test in tests:
        test.pack(setup.base.model, options.batch_size)
    outcomes = [DatasetScores(target, {}) for target in targets]
    stage = Stage(setup.base.model)
    try:
        for number, contestant in enumerate(contestants, start=1):
            started, entrant = time.perf_counter(), contestant(setup)
            cells = [
                _cell(stage, setup, entrant, target, among, test)
                for target, test in zip(targets, tests, strict=True)
            ]
            if not all(cell.scores for cell in cells):
                log.warning("%s: nothing to enter for some dataset; left out", entrant.name)
                continue
            for outcome, cell in zip(outcomes, cells, strict=True):
                outcome.cells[entrant.name] = cell
            log.info(
                "column %d/%d, %s: %.2f on %s, %.0f s",
                number,
                len(contestants),
                entrant.name,
                fmean(cell.mean("exact_match") or 0.0 for cell in cells),
                counted(len(targets), "dataset"),
                time.perf_counter() - started,
            )
    finally:
        stage.clear()
    return outcomes


def _cell(
    stage: "Stage",
    setup: EvaluationSetup,
    entrant: Contestant,
    target: Target,
    among: Sequence[Target],
    test: TestRows,
) -> Cell:
    """Scores all entries of a contestant for one dataset; where only the best one counts, those of
    a shortlist."""
    cell, options = Cell(), setup.options

    def rows_of(rows: Sequence[Row]) -> TestRows:
        punctuation = options.ignore_final_punctuation
        return TestRows(setup.base.tokenizer, rows, test.closed or [], punctuation)

    def scores_of(entry: Entry, asked: TestRows, choices: bool) -> Scores:
        routed = isinstance(entry.adapter, Routed)
        size = min(options.batch_size, ROUTED_ROWS) if routed else options.batch_size
        with stage.showing(entry, f"{entrant.name} for {target.name}") as model:
            return asked.score(model, size, choices)

    entries: Iterable[Entry] = entrant.entries(target, among)
    if entrant.best and len(test.rows) > FIRST_ROWS:
        few = rows_of(test.rows[:: -(-len(test.rows) // FIRST_ROWS)])
        few.cost = test.cost
        entries = nlargest(
            FINALISTS,
            entries,
            key=lambda entry: (entry.seeded, quality(scores_of(entry, few, choices=False))),
        )
    for entry in entries:
        asked = test if entry.rows is None else rows_of(entry.rows)
        cell.scores.append(scores_of(entry, asked, options.choices))
        if entry.seconds is not None:
            cell.seconds.append(entry.seconds)
    if entrant.best:
        cell.keep_best()
    return cell


class Stage:
    """The base model with what is tested on it. Of adapters of one shape, only the weights are
    replaced; the base is unchanged once the stage is cleared."""

    def __init__(self, base: Any) -> None:
        self.base = base
        self._model: Any = None
        """A `PeftModel` around the base; None: nothing is attached."""
        self._adapter: Adapter | Routed | None = None
        """What was attached; the weights of an `Adapter` may have been replaced since."""

    @contextmanager
    def showing(self, entry: Entry, origin: str) -> Iterator[Any]:
        """Yields the model of an entry. Raises LoragenError if its adapter does not fit."""
        shown, now = entry.adapter, self._adapter
        if shown is None:
            self.clear()
            yield self.base
            return
        if isinstance(shown, Routed):
            if now is not shown:
                self.clear()
                self._model, self._adapter = routed_model(self.base, shown), shown
        elif isinstance(now, Adapter) and _shapes(now) == _shapes(shown):
            swap_adapter(self._model, rescaled(shown, now.config), origin)
        else:
            self.clear()
            self._model, self._adapter = attach_adapter(self.base, shown, origin), shown
        yield self._model

    def clear(self) -> None:
        if self._model is not None:
            self._model.unload()
        self._model = self._adapter = None


def _shapes(adapter: Adapter) -> dict[str, Any]:
    return {key: tensor.shape for key, tensor in adapter.tensors.items()}


def routed_model(base: Any, routed: Routed) -> Any:
    """Returns a `PeftModel` of the base with PEFT's Arrow router over several adapters. Raises
    LoragenError if they are not alike, or do not fit the base."""
    from peft import ArrowConfig, create_arrow_model

    settings = ArrowConfig(top_k=routed.top_k, rng_seed=0)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"task-{index}" for index in range(len(routed.adapters))]
        for path, adapter in zip(paths, routed.adapters, strict=True):
            write_adapter(path, adapter, "")
        try:
            model = create_arrow_model(base, list(map(str, paths)), settings)
        except (TypeError, ValueError, RuntimeError) as error:
            raise LoragenError(
                f"arrow: the collected adapters cannot be routed: {first_line(error)}"
            ) from None
    return model.eval()


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


def results_document(
    outcomes: Sequence[DatasetScores], setup: EvaluationSetup, report: Novelty | None
) -> dict[str, Any]:
    """Returns the content of results.json, with unweighted means over each group's datasets."""
    names = [list(outcome.cells) for outcome in outcomes]
    columns = [name for name in names[0] if all(name in others for others in names)]
    datasets = [_dataset_document(outcome, columns, setup, report) for outcome in outcomes]
    options = asdict(setup.options)
    del options["keep"], options["prompts"]
    return {
        "base_model": setup.base.name,
        "columns": columns,
        **summaries(datasets, columns),
        "seconds": _seconds(outcomes, columns, setup.sources),
        "multi_task": _multi_task_document(setup.multi_task) if setup.multi_task else None,
        "novelty": report.as_dict(datasets) if report else None,
        "options": options,
        "datasets": datasets,
    }


def _dataset_document(
    outcome: DatasetScores,
    columns: Sequence[str],
    setup: EvaluationSetup,
    report: Novelty | None,
) -> dict[str, Any]:
    target, cells = outcome.target, {name: outcome.cells[name] for name in columns}
    fields = {
        "accuracy": "exact_match",
        "choice_accuracy": "choice_accuracy",
        "format_validity": "format_validity",
        "loss": "loss",
    }
    measured = {
        measure: {name: cell.mean(of) for name, cell in cells.items()}
        for measure, of in fields.items()
    }
    document = {
        "name": target.name,
        "group": target.group,
        "source": target.dataset.location,
        "rows": len(target.rows),
        "prompts": len(draws_of(target, setup.generator, setup.options)[0]),
        "prompts_from": target.prompts_from,
        **{key: of for key, of in measured.items() if None not in of.values()},
        "correct": {
            name: [bits_of(score.hits) for score in cell.scores] for name, cell in cells.items()
        },
        "novelty": dict(report.of_targets[target.key]) if report else None,
    }
    return {**document, **summary([document], columns)}


def _multi_task_document(trained: TrainedAdapter) -> dict[str, Any]:
    config = trained.run.config
    return {
        "steps": trained.steps,
        "seconds": round(trained.seconds, 1),
        "trainings": 1 + len(trained.rivals),
        "learning_rate": config.schedule.options.get("learning_rate"),
        "rank": config.lora.rank,
    }


def _seconds(
    outcomes: Sequence[DatasetScores],
    columns: Sequence[str],
    sources: Sequence[TrainingSource],
) -> dict[str, Any]:
    """Returns the mean times to train one of the generator's training adapters, to generate an
    adapter, and to obtain the adapter of each column."""
    obtain = {}
    for name in columns:
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
