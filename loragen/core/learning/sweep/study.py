"""A study: the trials of a sweep, in a directory that several processes and machines may share.

Optuna keeps the trials in a journal file and chooses what to try and what to prune. This module
adds what a training of hours needs: a trial whose process died is told failed and tried again, the
number of trials is that of all processes together, and a command that searches something else is
refused. Nothing heavy is imported before a study is opened.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from shutil import rmtree
from typing import Any, Literal
from uuid import uuid4

from filelock import FileLock
from pydantic import BaseModel

from loragen import __version__
from loragen.core.config import dump, load
from loragen.core.config.schema import MODELS
from loragen.core.config.show import differences
from loragen.core.contents import read_json, record_of
from loragen.core.errors import (
    DataError,
    Interrupted,
    UsageError,
    counted,
    listing,
    one_line,
    pip_install,
)
from loragen.core.files import write_json, write_text
from loragen.core.learning.sweep.space import Param, described
from loragen.core.learning.sweep.trainings import SweptTraining
from loragen.core.outputs import check_writable
from loragen.core.progress import Progress
from loragen.core.run.directory import TrialRecord
from loragen.core.run.lock import RunLock, writer_of

log = logging.getLogger(__name__)

JOURNAL, RECORD, CONFIG, BEST = "journal.log", "study.json", "config.yaml", "best.yaml"
WORKERS = "workers"
FORMAT_VERSION = 1
STATES = {
    "COMPLETE": "finished",
    "PRUNED": "pruned",
    "FAIL": "failed",
    "RUNNING": "running",
    "WAITING": "waiting",
}
"""{state of Optuna: the word for it here}"""


class StudyRecord(BaseModel):
    """What a study searches, and by what: study.json. The configuration is beside it."""

    format_version: int = FORMAT_VERSION
    loragen: str = __version__
    command: str
    metric: str
    direction: Literal["minimize", "maximize"]
    space: dict[str, str]
    """{setting: its range, as it was given}"""
    inputs: dict[str, str]
    startup_trials: int
    """The trials at random before the search learns from them, and before one is pruned."""
    pruning: bool
    seed: int


class Pruned(Interrupted):
    """The study has ended a trial, since others were better at the same step."""


@dataclass
class TrialSummary:
    """A trial, as it is listed."""

    number: int
    state: str
    value: float | None
    """The metric: of a finished trial that of the weights it has kept, of a pruned one the last."""
    params: dict[str, Any]
    run: str | None
    step: int | None
    """The last step that was validated."""
    problem: str | None = None
    again: bool = False
    """Whether its process died or was interrupted, and another trial has its settings."""
    validated: dict[int, float] = field(default_factory=dict)
    """{step: the metric}"""


class StudyTrial:
    """A trial in this process; it is the `Trial` of the run that trains it."""

    def __init__(self, study: "Study", trial: Any) -> None:
        self._study, self._trial = study, trial
        self.number: int = trial.number
        self.record = TrialRecord(study=str(study.directory.absolute()), number=trial.number)

    def started(self, directory: Path) -> None:
        self._trial.set_user_attr("run", str(directory))

    def validated(self, metrics: Mapping[str, float], step: int, is_last: bool) -> None:
        """Reports a validation to the study. Raises Pruned if others were better at this step,
        UsageError if the run does not validate the study's metric."""
        record = self._study.record
        if record.metric not in metrics:
            found = [name for name in metrics if name.startswith("val")]
            raise UsageError(f"--metric {record.metric}: this run validates {listing(found)}")
        value = metrics[record.metric]
        if not isfinite(value):  # the training itself ends such a run
            return
        self._trial.report(value, step)
        if record.pruning and not is_last and self._trial.should_prune():
            self.record.pruned_at = step
            raise Pruned(
                f"pruned after step {step}: {record.metric} {value:.4f} is worse than the median "
                "of other trials at this step"
            )


class Study:
    """A study that this process takes part in, from `open` to the end of its context."""

    def __init__(self, directory: Path, record: StudyRecord, params: Sequence[Param]) -> None:
        self.directory, self.record, self.params = directory, record, params
        self._lock = FileLock(directory / ".lock", thread_local=False)
        self._worker = directory / WORKERS / uuid4().hex[:12]
        self._alive: RunLock | None = None
        self._optuna = _imported()
        storages = self._optuna.storages
        backend = storages.journal.JournalFileBackend(str(directory / JOURNAL))
        with self._lock:
            self._study = self._optuna.create_study(
                study_name="loragen",
                storage=storages.JournalStorage(backend),
                direction=record.direction,
                load_if_exists=True,
                pruner=self._optuna.pruners.MedianPruner(n_startup_trials=record.startup_trials),
            )

    @classmethod
    @contextmanager
    def open(
        cls, directory: Path, record: StudyRecord, params: Sequence[Param], training: Any, base: Any
    ) -> Iterator["Study"]:
        """Opens the study in a directory, or begins one; `base` is the configuration with the first
        ends of all ranges.

        Raises UsageError if Optuna is not installed, the directory holds something else, or the
        study in it is another one, with all that differs.
        """
        _imported()
        check_study(directory, record, training, base)
        check_writable(directory)
        directory.mkdir(parents=True, exist_ok=True)
        with FileLock(directory / ".lock"):
            check_study(directory, record, training, base)  # another process may have begun one
            if not (directory / RECORD).is_file():
                write_text(directory / CONFIG, dump(base))
                write_json(directory / RECORD, record.model_dump(mode="json"))
        study = cls(directory, record, params)
        with study:
            yield study

    def __enter__(self) -> "Study":
        self._worker.mkdir(parents=True)
        self._alive = RunLock(self._worker).acquire()
        return self

    def __exit__(self, *_: object) -> None:
        if self._alive:
            self._alive.release()
        with suppress(OSError):
            rmtree(self._worker)

    def ask(self, wanted: int) -> StudyTrial | None:
        """Returns the next trial; None if the study has `wanted` of them, with those that other
        processes are training. Trials whose process died are told failed before."""
        with self._lock:
            self._tell_dead()
            trials = self._study.get_trials(deepcopy=False)
            waiting = any(t.state.name == "WAITING" for t in trials)
            if not waiting and sum(not t.user_attrs.get("again") for t in trials) >= wanted:
                return None
            # A seed of its own, so that processes that begin together try different settings.
            self._study.sampler = self._optuna.samplers.TPESampler(
                n_startup_trials=self.record.startup_trials,
                seed=(self.record.seed * 1_000_003 + len(trials)) % 2**32,
            )
            trial = self._study.ask()
            trial.set_user_attr("worker", self._worker.name)
            for param in self.params:
                param.suggested(trial)
        return StudyTrial(self, trial)

    def values(self, trial: StudyTrial) -> dict[str, Any]:
        """Returns the settings of a trial."""
        return {param.key: param.suggested(trial._trial) for param in self.params}

    def finished(self, trial: StudyTrial, value: float) -> None:
        self._study.tell(trial.number, value)

    def pruned(self, trial: StudyTrial) -> None:
        self._study.tell(trial.number, state=self._optuna.trial.TrialState.PRUNED)

    def failed(self, trial: StudyTrial, reason: str) -> None:
        """Counts a trial as failed: its settings are not tried again."""
        trial._trial.set_user_attr("problem", reason)
        self._study.tell(trial.number, state=self._optuna.trial.TrialState.FAIL)

    def stopped(self, trial: StudyTrial, reason: str) -> None:
        """Counts a trial as failed through no fault of its settings, which are tried again."""
        with self._lock:
            found = self._study.get_trials(deepcopy=False)[trial.number]
            self._tell_stopped(found, reason)

    def _tell_dead(self) -> None:
        """Tells failed what a process was training that is gone."""
        for trial in self._study.get_trials(deepcopy=False):
            if trial.state.name != "RUNNING":
                continue
            worker = trial.user_attrs.get("worker")
            folder = self.directory / WORKERS / str(worker)
            if worker == self._worker.name or (folder.is_dir() and writer_of(folder)):
                continue
            self._tell_stopped(trial, "its process has died")
            with suppress(OSError):
                rmtree(folder)

    def _tell_stopped(self, trial: Any, reason: str) -> None:
        """Settings whose trial has stopped twice may be the cause, and are not tried again."""
        storage, number = self._study._storage, trial._trial_id
        again = "again_of" not in trial.user_attrs and len(trial.params) == len(self.params)
        storage.set_trial_user_attr(number, "problem", reason)
        storage.set_trial_user_attr(number, "again", again or not trial.params)
        self._study.tell(trial.number, state=self._optuna.trial.TrialState.FAIL)
        if again:
            self._study.enqueue_trial(trial.params, user_attrs={"again_of": trial.number})
        log.info(
            "trial %d: %s; %s",
            trial.number,
            reason,
            "its settings will be tried again" if again else "it counts as failed",
        )

    def write_best(self, training: SweptTraining[Any]) -> None:
        """Renews best.yaml by the best trial of all processes."""
        with self._lock:
            best = best_of(self.trials(), self.record.direction)
            if best is None:
                return
            config = training.recorded(training.config(best.params))
            head = (
                f"# {self.record.metric} {best.value:.6g}, the best of "
                f"{counted(len(self.trials()), 'trial')} of `loragen sweep {self.record.command}`: "
                f"trial {best.number}, {described(best.params)}\n"
                f"# loragen {self.record.command} --config {self.directory / BEST}\n"
            )
            write_text(self.directory / BEST, head + dump(config))

    def trials(self) -> list[TrialSummary]:
        """Returns all trials of the study in their order, but those that wait to be tried again."""
        known = {param.key: param for param in self.params}
        found = []
        for trial in self._study.get_trials(deepcopy=False):
            if trial.state.name == "WAITING":
                continue
            attributes = trial.user_attrs
            params = {k: known[k].value_of(v) for k, v in trial.params.items() if k in known}
            found.append(
                TrialSummary(
                    trial.number,
                    STATES[trial.state.name],
                    trial.value,
                    {key: params[key] for key in known if key in params},
                    attributes.get("run"),
                    trial.last_step,
                    attributes.get("problem"),
                    bool(attributes.get("again")),
                    dict(trial.intermediate_values),
                )
            )
        return found


def run_trials(study: Study, training: SweptTraining[Any], wanted: int, progress: Progress) -> None:
    """Trains trials until the study has `wanted` of them.

    A trial that fails stops no other, unless it is a mistake of the user's and no trial has
    succeeded before. Raises Interrupted or KeyboardInterrupt once the trial is told failed.
    """
    while trial := study.ask(wanted):
        values = study.values(trial)
        log.info("trial %d (%d wanted): %s", trial.number, wanted, described(values))
        try:
            run = training.train(training.config(values), trial, progress)
            value = training.value(run, study.record.metric)
        except Pruned as error:
            study.pruned(trial)
            log.info("trial %d: %s", trial.number, one_line(error))
        except (KeyboardInterrupt, Interrupted) as error:
            reason = one_line(error) if isinstance(error, Interrupted) else "interrupted"
            study.stopped(trial, reason)
            raise
        except Exception as error:
            study.failed(trial, one_line(error))
            succeeded = any(t.state in ("finished", "pruned") for t in study.trials())
            if isinstance(error, UsageError | DataError) and not succeeded:
                raise
            log.warning("trial %d failed: %s", trial.number, one_line(error))
        else:
            study.finished(trial, value)
            study.write_best(training)
            log.info("trial %d: %s %.6g", trial.number, study.record.metric, value)


def best_of(trials: Sequence[TrialSummary], direction: str) -> TrialSummary | None:
    """Returns the finished trial with the best value, the first one of equals; a pruned trial has
    kept no weights."""
    finished = [trial for trial in trials if trial.state == "finished" and trial.value is not None]
    sign = -1 if direction == "maximize" else 1
    return min(finished, key=lambda trial: sign * float(trial.value or 0), default=None)


def check_study(
    directory: Path, record: StudyRecord, training: SweptTraining[Any], base: Any
) -> None:
    """Raises UsageError if a directory holds something else than this study, with all that
    differs."""
    if not (directory / RECORD).is_file():
        if directory.is_dir() and [p for p in directory.iterdir() if p.name != ".lock"]:
            raise UsageError(f"--study {directory}: holds something else; name another directory")
        if directory.exists() and not directory.is_dir():
            raise UsageError(f"--study {directory}: is a file; name a directory")
        return
    then = record_of(read_json(directory / RECORD), StudyRecord, directory / RECORD, "a study")
    problems = []
    for name in ("command", "metric", "direction", "startup_trials", "pruning"):
        old, new = getattr(then, name), getattr(record, name)
        if old != new:
            problems.append(f"{name.replace('_', ' ')} is {new}, the study has {old}")
    if not problems:
        for key in dict.fromkeys([*then.space, *record.space]):
            old, new = (space.get(key, "not searched") for space in (then.space, record.space))
            if old != new:
                problems.append(f"--param {key}: {new}, the study has {old}")
        old_base = load(MODELS[record.command.split()[0]], directory / CONFIG, environment={})
        free = [*training.free, *then.space, *record.space]
        problems += differences(old_base, base, free, "the study")
        for key in dict.fromkeys([*then.inputs, *record.inputs]):
            if then.inputs.get(key) != record.inputs.get(key):
                problems.append(f"{key} is another one than in the study")
    if problems:
        raise UsageError(
            *(f"{directory}: {problem}" for problem in problems),
            f"{directory} goes on with the command that began it; give this one another --study",
        )


def _imported() -> Any:
    """Imports Optuna. Raises UsageError if it is not installed."""
    if not find_spec("optuna"):
        raise UsageError(f"a sweep needs Optuna: {pip_install('sweep')}")
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
