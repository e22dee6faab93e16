"""The tasks of a `lora train` command: its datasets, the settings that decide their results, and
the earlier runs that have the same result. This module imports nothing heavy."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from traceback import clear_frames
from typing import Literal, NamedTuple

from loragen.core.base.names import absolute_base, resolve_base
from loragen.core.config import LoraTrainConfig
from loragen.core.config.load import Problem, problems_at
from loragen.core.config.schema import LauncherSection, LoraDataSection
from loragen.core.config.show import HARDWARE, differences
from loragen.core.data.dataset import Dataset, dataset_names
from loragen.core.data.documents import NO_STREAM, parsed_source
from loragen.core.errors import Interrupted, LoragenError, UsageError, one_line
from loragen.core.files import user_path
from loragen.core.progress import Progress
from loragen.core.run.directory import MANIFEST, LoraManifest, LoraRun, Run


@dataclass(frozen=True, eq=False)
class Task:
    """One dataset to train an adapter on."""

    dataset: Dataset
    argument: str
    """The dataset as the user named it."""
    validation: Dataset | None = None
    """`data.validation`, opened once for all tasks of a command."""

    @property
    def name(self) -> str:
        return self.dataset.name

    def config(self, config: LoraTrainConfig) -> LoraTrainConfig:
        """Returns the configuration that trains this dataset alone, as its run records it."""
        own = config.model_copy(deep=True)
        own.data.dataset = self.argument
        own.collection, own.launcher = [], LauncherSection()
        return own


def find_tasks(config: LoraTrainConfig, named: Sequence[str], every: bool) -> list[Task]:
    """Finds the datasets: those named, `every` one below data.root, or those of the configuration.

    Raises UsageError if there are none, for names that are not found (all at once) and for a
    dataset that is named twice.
    """
    root = Path(config.data.root)
    if every and named:
        raise UsageError("--all is every dataset below --data-root: leave out --dataset")
    arguments = dataset_names(root) if every else list(named) or config.collection
    if every and not arguments:
        raise UsageError(f"--all: no datasets in {root}; see --data-root")
    if not arguments and config.data.dataset:
        arguments = [config.data.dataset]
    if not arguments:
        raise UsageError(
            "no dataset: give --dataset NAME|FILE or --all, or data.dataset in the YAML"
        )
    validation = Dataset.at(config.data.validation) if config.data.validation else None
    if validation and validation.is_stream:
        raise UsageError(f"data.validation {validation}: {NO_STREAM}")
    tasks: list[Task] = []
    files: set[str] = set()
    problems: list[str] = []
    for argument in arguments:
        try:
            dataset = Dataset.find(argument, root)
        except UsageError as error:
            problems += error.problems
            continue
        if dataset.is_stream:
            problems.append(f"dataset {argument}: {NO_STREAM}")
            continue
        tasks.append(Task(dataset, argument, validation))
        file = str(dataset.file.resolve()) if dataset.file else dataset.location
        if file in files:
            problems.append(f"dataset {argument}: named twice; name it once")
        files.add(file)
    if problems:
        raise UsageError(*dict.fromkeys(problems))
    return tasks


@dataclass(frozen=True)
class TaskOutcome:
    """The result of a task."""

    task: Task
    status: Literal["trained", "skipped", "failed", "interrupted"]
    run: LoraRun | None = None
    reason: str = ""
    """The reason why the dataset was not trained on, in one line."""
    error: BaseException | None = None

    @classmethod
    def failed(cls, task: Task, error: BaseException) -> "TaskOutcome":
        """Returns the outcome of an error, and frees the batches and graphs that its frames hold,
        because the next dataset needs their memory."""
        link: BaseException | None = error
        while link:
            clear_frames(link.__traceback__)
            link = link.__cause__ or link.__context__
        return cls(task, "failed", reason=one_line(error), error=error)

    @classmethod
    def interrupted(cls, task: Task, reason: str = "not started") -> "TaskOutcome":
        return cls(task, "interrupted", reason=reason, error=Interrupted(reason))

    def show(self, progress: Progress) -> None:
        if self.status == "trained" and self.run:
            seconds = self.run.manifest.seconds or 0
            line = f"done in {seconds:.0f} s: {self.run.directory}"
            progress.outcome(self.task.name, "done", line)
        elif self.status != "trained":
            line = self.reason if self.status == "skipped" else f"{self.status}: {self.reason}"
            progress.outcome(self.task.name, self.status, line)


# ---------------------------------------------------------------------------- settings


IGNORED_ON_RESUME = (
    "base_model",  # compared by its fingerprint, or its name
    "trust_remote_code",
    "base_dtype",  # compared by the dtype that the base computes in
    "runs_dir",
    "collection",
    "launcher",
    "loggers",
    "final_model",
    "track_batches",
    # The data are compared by hashes. Without bad rows, skip_bad_rows changes nothing.
    "data.root",
    "data.dataset",
    "data.validation",
    "data.skip_bad_rows",
    "data.workers",
    "checkpoints.last_every",
    "training.gradient_checkpointing",
    *HARDWARE,
)
"""Sections and keys in which two runs with the same result may differ."""


def same_base(one: str, other: str) -> bool:
    """Returns whether two names are of one base model; a path may have several names."""
    paths = [user_path(name) for name in (one, other)]
    return one == other or (
        all(path.exists() for path in paths) and paths[0].resolve() == paths[1].resolve()
    )


def same_dtype(then: LoraTrainConfig, computed: str, now: LoraTrainConfig) -> bool:
    """Returns whether a base that computed in the dtype `computed` (empty: not known) would do so
    again. Two runs with `auto` count as the same, because only a base in memory shows its choice.
    """
    if now.base_dtype == "auto":
        return then.base_dtype == "auto"
    return computed in ("", now.base_dtype)


def with_absolute_paths(config: LoraTrainConfig) -> LoraTrainConfig:
    """Returns the configuration with absolute paths of base model and validation file: a run may be
    resumed, and an adapter loaded, from another directory."""
    absolute = config.model_copy(deep=True)
    absolute.base_model = absolute_base(config.base_model)
    if config.data.validation:
        absolute.data.validation = parsed_source(config.data.validation).location
    return absolute


def missing_lora_paths(config: LoraTrainConfig) -> list[Problem]:
    """Finds every dataset, file and local base that is named and missing, without the hub."""
    data, root = config.data, Path(config.data.root)
    found = problems_at(("base_model",), resolve_base, config.base_model)
    for i, name in enumerate(config.collection):
        found += problems_at(("collection", i), Dataset.find, name, root)
    if data.dataset is not None:
        found += problems_at(("data", "dataset"), Dataset.find, data.dataset, root)
    elif not config.collection and data.root != LoraDataSection().root and not root.is_dir():
        found.append((("data", "root"), f"{root}: no such directory"))
    if data.validation is not None:
        found += problems_at(("data", "validation"), _check_file, data.validation)
    return found


def _check_file(text: str) -> None:
    source = parsed_source(text)
    if source.is_missing:
        raise UsageError(f"{source}: no such file")


# ---------------------------------------------------------------------------- earlier runs


class EarlierRuns(NamedTuple):
    """The newest runs below runs_dir that train what a task would train."""

    finished: LoraRun | None = None
    unfinished: LoraRun | None = None
    """The run may also be running at this moment."""


def earlier_runs(
    config: LoraTrainConfig, task: Task, ignored: Collection[str] = IGNORED_ON_RESUME
) -> EarlierRuns:
    """Finds the earlier runs of a task. Every manifest is read once.

    Two runs are the same if they agree in the bytes of the dataset, the name of the base model and
    every setting that decides the result, which are all but those `ignored`. The trials of a sweep
    are not counted. Nothing heavy is loaded, so the base's weights are not compared.
    """
    validation = task.validation
    if config.data.validation and validation is None:
        validation = Dataset.at(config.data.validation)
    pattern = f"{escape(task.name)}_lora_*/{MANIFEST}"
    finished, unfinished = None, None
    for file in sorted(Path(config.runs_dir).glob(pattern), reverse=True):
        try:
            run = Run.open(file.parent, LoraManifest)
            manifest, then = run.manifest, run.config
            same = (
                manifest.trial is None
                and manifest.dataset.sha256 == task.dataset.sha256
                and manifest.dataset.validation == (validation.sha256 if validation else "")
                and same_base(manifest.base_model, config.base_model)
                and same_dtype(then, manifest.base_dtype, config)
                and not differences(then, config, ignored)
            )
        except LoragenError:  # a run that is damaged or of another version does not count
            continue
        if same and manifest.status == "success":
            finished = finished or run
        elif same:
            unfinished = unfinished or run
    return EarlierRuns(finished, unfinished)
