"""Many datasets, one adapter each: what is done already is skipped, what fails stops nothing."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from loragen.core.config import LoraTrainConfig
from loragen.core.data.rows import check_rows
from loragen.core.errors import UsageError
from loragen.core.lora.tasks import (
    Task,
    TaskOutcome,
    failed,
    finished_run,
    unfinished_run,
)
from loragen.core.progress import Progress

log = logging.getLogger(__name__)


def collect(
    config: LoraTrainConfig,
    tasks: Sequence[Task],
    progress: Progress,
    force: bool = False,
) -> list[TaskOutcome]:
    """A run per dataset, as `config.launcher` says; the outcomes in the order of the tasks.

    Every file is read before the first dataset trains. Raises what went wrong only where there is
    a single dataset, or where none can train: the base does not load, the cluster is not there.
    """
    outcomes: dict[Task, TaskOutcome] = {}

    def settle(settled: Iterable[TaskOutcome]) -> None:
        for outcome in settled:
            outcomes[outcome.task] = outcome
            if len(tasks) == 1 and outcome.error:
                raise outcome.error
            outcome.show(progress)

    if Path(config.runs_dir).exists() and not Path(config.runs_dir).is_dir():
        raise UsageError(f"runs_dir {config.runs_dir} is a file")
    progress.begin([task.name for task in tasks])
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


def _settled(config: LoraTrainConfig, tasks: Sequence[Task], force: bool) -> Iterator[TaskOutcome]:
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
            yield TaskOutcome(task, "skipped", run, reason)


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
    config: LoraTrainConfig, tasks: Sequence[Task], progress: Progress
) -> Iterator[TaskOutcome]:
    if config.launcher.name == "ray":
        from loragen.core.lora.launch import train_on_ray

        return train_on_ray(config, tasks, progress)
    from loragen.core.lora.launch import train_here, train_in_processes, wants_processes

    if len(tasks) > 1 and wants_processes(config):
        return train_in_processes(config, tasks, progress)
    return train_here(config, tasks, progress)
