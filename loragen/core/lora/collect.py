"""Many datasets, one adapter each: what is done already is skipped, what fails stops nothing."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from traceback import clear_frames
from typing import Literal, Protocol

from loragen.core.config import LoraTrainConfig
from loragen.core.config.lora_schema import Launcher
from loragen.core.data.documents import Source, content_hash, location
from loragen.core.data.rows import check_rows, dataset_names, find_dataset
from loragen.core.errors import LoragenError, UsageError, one_line
from loragen.core.interrupt import Interrupted
from loragen.core.lora.identity import differences, same_base, same_dtype, validation_hash
from loragen.core.manifests import MANIFEST
from loragen.core.progress import Step
from loragen.core.runs import LoraRun, read_run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """One dataset to train an adapter on."""

    wanted: str
    """As the user named it."""
    name: str
    source: Source


@dataclass(frozen=True)
class Outcome:
    """What became of a task."""

    task: Task
    status: Literal["trained", "skipped", "failed", "interrupted"]
    run: LoraRun | None = None
    reason: str = ""
    """In one line, where it was not trained."""
    error: BaseException | None = None


class CollectionProgress(Protocol):
    """What a collection tells of itself while it runs."""

    def begin(self, tasks: Sequence[Task]) -> None: ...

    def started(self, task: Task, steps: int) -> None: ...

    def step(self, task: Task, step: Step) -> None: ...

    def ended(self, outcome: Outcome) -> None: ...

    def stop(self) -> None: ...


def tasks(config: LoraTrainConfig, wanted: Sequence[str], every: bool) -> list[Task]:
    """The datasets named, all below data.root, or those of the configuration.

    Raises UsageError for none, for names that are not there (all at once) and for one named twice.
    """
    named = _named(config, wanted, every)
    found: list[Task] = []
    problems: list[str] = []
    for name in named:
        try:
            found.append(Task(name, *find_dataset(name, Path(config.data.root))))
        except UsageError as error:
            problems += error.problems
    if problems:
        raise UsageError(*problems)
    places = [_place(task.source) for task in found]
    twice = [task.wanted for i, task in enumerate(found) if places[i] in places[:i]]
    if twice:
        raise UsageError(*(f"dataset {name} is named twice" for name in dict.fromkeys(twice)))
    return found


def collect(
    config: LoraTrainConfig,
    tasks: Sequence[Task],
    progress: CollectionProgress,
    force: bool = False,
) -> list[Outcome]:
    """A run per dataset, as `config.launcher` says; the outcomes in the order of the tasks.

    Every file is read before the first dataset trains. Raises what went wrong only where there is
    a single dataset, or where none can train: the base does not load, the cluster is not there.
    """
    outcomes: dict[Task, Outcome] = {}

    def settle(settled: Iterable[Outcome]) -> None:
        for outcome in settled:
            outcomes[outcome.task] = outcome
            if len(tasks) == 1 and outcome.error:
                raise outcome.error
            progress.ended(outcome)

    if Path(config.runs_dir).exists() and not Path(config.runs_dir).is_dir():
        raise UsageError(f"runs_dir {config.runs_dir} is a file")
    progress.begin(tasks)
    try:
        settle(_settled(config, tasks, force))
        left = [task for task in tasks if task not in outcomes]
        if not force:
            _tell_of_unfinished(config, left)
        if left:
            settle(_launch(config, left, progress))
    finally:
        progress.stop()
    return [outcomes[task] for task in tasks]


def finished_run(config: LoraTrainConfig, task: Task) -> LoraRun | None:
    """The newest run below runs_dir that has trained what the task would train.

    Compared are the bytes of the dataset, the name of the base model and every setting that decides
    the result; nothing heavy is loaded, and so the weights of the base are not.
    """
    same = (run for run in _same_runs(config, task) if run.manifest.status == "success")
    return next(same, None)


def unfinished_run(config: LoraTrainConfig, task: Task) -> LoraRun | None:
    """The newest of the same that has not come to its end; it may be running just now."""
    same = (run for run in _same_runs(config, task) if run.manifest.status != "success")
    return next(same, None)


def run_directories(config: LoraTrainConfig, task: Task) -> list[Path]:
    """Of a dataset of the task's name, the newest first."""
    pattern = f"{escape(task.name)}_lora_*/{MANIFEST}"
    return sorted((file.parent for file in Path(config.runs_dir).glob(pattern)), reverse=True)


def config_of(config: LoraTrainConfig, task: Task) -> LoraTrainConfig:
    """The configuration of one dataset's run: what would train it again, alone."""
    own = config.model_copy(deep=True)
    own.data.dataset = task.wanted
    own.collection, own.launcher = [], Launcher()
    return own


def failed(task: Task, error: BaseException) -> Outcome:
    """Lets go of what the error's frames hold: batches and graphs that the next dataset needs."""
    link: BaseException | None = error
    while link:
        clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
    return Outcome(task, "failed", reason=one_line(error), error=error)


def interrupted(task: Task, reason: str) -> Outcome:
    return Outcome(task, "interrupted", reason=reason, error=Interrupted(reason))


def not_started(tasks: Iterable[Task]) -> list[Outcome]:
    """The rest of a collection that was interrupted."""
    return [interrupted(task, "not started") for task in tasks]


def _place(source: Source) -> str:
    """The same for one file, however it is named."""
    return str(source.resolve()) if isinstance(source, Path) else location(source)


def _named(config: LoraTrainConfig, wanted: Sequence[str], every: bool) -> list[str]:
    if every and wanted:
        raise UsageError("--all is every dataset below --data-root: leave out --dataset")
    if every:
        names = dataset_names(Path(config.data.root))
        if not names:
            raise UsageError(f"--all: no datasets in {config.data.root}; see --data-root")
        return names
    named = list(wanted) or config.collection
    if not named and config.data.dataset:
        named = [config.data.dataset]
    if not named:
        raise UsageError(
            "which dataset? Give --dataset NAME|FILE or --all, or data.dataset in the YAML"
        )
    return named


def _settled(config: LoraTrainConfig, tasks: Sequence[Task], force: bool) -> Iterator[Outcome]:
    """The tasks of which nothing is to be trained: done already, or their file is bad."""
    for task in tasks:
        try:
            run = None if force else finished_run(config, task)
            if run is None:
                check_rows(task.source, config.data.skip_bad_rows)
        except Exception as error:  # noqa: BLE001  # a file may not be readable, a hub not there
            yield failed(task, error)
            continue
        if run:
            reason = f"done already in {run.directory} (--force trains it again)"
            yield Outcome(task, "skipped", run, reason)


def _tell_of_unfinished(config: LoraTrainConfig, tasks: Iterable[Task]) -> None:
    for task in tasks:
        run = unfinished_run(config, task)
        if run:
            log.info(
                "%s: an unfinished run is there; unless it is running: --resume %s",
                task.name,
                run.directory,
            )


def _launch(
    config: LoraTrainConfig, tasks: Sequence[Task], progress: CollectionProgress
) -> Iterator[Outcome]:
    if config.launcher.name == "ray":
        from loragen.core.lora.ray_launcher import train_on_ray

        return train_on_ray(config, tasks, progress)
    from loragen.core.lora.local_launcher import train_here, train_in_processes, wants_processes

    if len(tasks) > 1 and wants_processes(config):
        return train_in_processes(config, tasks, progress)
    return train_here(config, tasks, progress)


def _same_runs(config: LoraTrainConfig, task: Task) -> Iterator[LoraRun]:
    """The runs below runs_dir that would come out the same, the newest first."""
    directories = run_directories(config, task)
    digest = content_hash(task.source) if directories else ""
    for directory in directories:
        try:
            run, then = read_run(directory)
        except LoragenError:  # of another loragen, or damaged: no reason not to train
            continue
        manifest = run.manifest
        if (
            manifest.dataset.sha256 == digest
            and same_base(manifest.base_model, config.base_model)
            and same_dtype(then, manifest.base_dtype, config)
            and manifest.dataset.validation == validation_hash(config)
            and not differences(then, config)
        ):
            yield run
