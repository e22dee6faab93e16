"""The datasets to train on, what became of each, and the earlier runs of each. Light."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from traceback import clear_frames
from typing import Literal

from loragen.core.config import LoraTrainConfig
from loragen.core.config.schema import LauncherSection
from loragen.core.data.documents import Source, content_hash, location
from loragen.core.data.rows import dataset_names, find_dataset
from loragen.core.errors import Interrupted, LoragenError, UsageError, one_line
from loragen.core.lora.settings import result_differences, same_base, same_dtype, validation_hash
from loragen.core.progress import Progress
from loragen.core.run.directory import MANIFEST, LoraRun, read_run


@dataclass(frozen=True)
class Task:
    """One dataset to train an adapter on."""

    wanted: str
    """As the user named it."""
    name: str
    source: Source


@dataclass(frozen=True)
class TaskOutcome:
    """What became of a task."""

    task: Task
    status: Literal["trained", "skipped", "failed", "interrupted"]
    run: LoraRun | None = None
    reason: str = ""
    """In one line, where it was not trained."""
    error: BaseException | None = None

    def show(self, progress: Progress) -> None:
        if self.status == "trained" and self.run:
            seconds = self.run.manifest.seconds or 0
            line = f"done in {seconds:.0f} s: {self.run.directory}"
            progress.outcome(self.task.name, "done", line)
        elif self.status != "trained":
            line = self.reason if self.status == "skipped" else f"{self.status}: {self.reason}"
            progress.outcome(self.task.name, self.status, line)


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
    own.collection, own.launcher = [], LauncherSection()
    return own


def failed(task: Task, error: BaseException) -> TaskOutcome:
    """Lets go of what the error's frames hold: batches and graphs that the next dataset needs."""
    link: BaseException | None = error
    while link:
        clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
    return TaskOutcome(task, "failed", reason=one_line(error), error=error)


def interrupted(task: Task, reason: str) -> TaskOutcome:
    return TaskOutcome(task, "interrupted", reason=reason, error=Interrupted(reason))


def not_started(tasks: Iterable[Task]) -> list[TaskOutcome]:
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
            and not result_differences(then, config)
        ):
            yield run
