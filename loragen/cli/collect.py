"""What `loragen lora train` does, apart from reading its options."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loragen.cli import render
from loragen.core.config import LoraTrainConfig, Override, dump, load
from loragen.core.errors import LoragenError, UsageError
from loragen.core.interrupt import Interrupted
from loragen.core.lora.collect import Outcome, Task, collect, config_of, tasks
from loragen.core.runs import TEST_MODE_STEPS


@dataclass(frozen=True)
class ConfigSource:
    """Where the configuration comes from."""

    file: Path | None
    settings: Sequence[str]
    flags: Sequence[Override]
    test_mode: bool

    def config(self, default: Path | None = None) -> LoraTrainConfig:
        config = load(LoraTrainConfig, self.file or default, self.settings, self.flags)
        if self.test_mode:
            _shorten(config)
        return config


def train(
    source: ConfigSource, wanted: Sequence[str], every: bool, force: bool, json: bool
) -> None:
    """A run per dataset; exit 1 with the list of those that failed."""
    from loragen.cli.collection_progress import collection_progress

    config = source.config()
    chosen = tasks(config, wanted, every)
    _report(collect(config, chosen, collection_progress(len(chosen)), force), json)


def dry_run(source: ConfigSource, wanted: Sequence[str], every: bool, json: bool) -> None:
    """The resolved configuration, once everything is checked."""
    from loragen.cli.dry_run import check

    config = source.config()
    chosen = tasks(config, wanted, every)
    check(config, chosen)
    if len(chosen) == 1:
        config = config_of(config, chosen[0])
    else:
        config.collection = [task.wanted for task in chosen]
    _answer_config(config, json)


def go_on(
    source: ConfigSource,
    path: Path,
    wanted: Sequence[str],
    every: bool,
    launcher: str | None,
    dry: bool,
    json: bool,
) -> None:
    """Goes on with the run at `path`, on its own dataset and settings where no others are given."""
    from loragen.core.manifests import LoraManifest, read_manifest
    from loragen.core.runs import CONFIG, run_directory_of

    if every or len(wanted) > 1 or launcher == "ray":
        raise UsageError("--resume goes on with one run, and so with one dataset, here")
    directory = run_directory_of(path)
    manifest = read_manifest(directory, LoraManifest)
    if not wanted and not manifest.dataset.path:  # of a converted run
        raise UsageError(f"{directory}: its dataset is not recorded; give --dataset FILE")
    config = source.config(directory / CONFIG)
    (task,) = tasks(config, wanted or [manifest.dataset.path], every=False)
    if dry:
        from loragen.cli.dry_run import check
        from loragen.core.lora.resume import check_settings, find_resume_point

        check_settings(find_resume_point(path), config)
        check(config, [task])
        _answer_config(config, json)
        return
    _report([_resumed(config, task, path)], json)


def _resumed(config: LoraTrainConfig, task: Task, path: Path) -> Outcome:
    from loragen.cli.progress import terminal_progress
    from loragen.core.lora.resume import find_resume_point, load_base_again, nothing_left
    from loragen.core.lora.train import train as train_one
    from loragen.core.progress import Silent
    from loragen.core.runs import LoraRun

    point = find_resume_point(path)
    if nothing_left(point, config):
        render.note(f"{point.directory}: finished at step {point.step}, nothing is left to do")
        return Outcome(task, "skipped", LoraRun(point.directory, point.manifest))
    found = point.checkpoint.name if point.checkpoint else "no checkpoint"
    done = point.step == config.training.max_steps
    then = "all steps are done" if done else f"the next step is {point.step + 1}"
    render.note(f"{point.directory}: found {found}; {then}")
    base = load_base_again(point, config)
    name = point.manifest.dataset.name
    progress = terminal_progress() if render.is_first_process() else Silent()
    run = train_one(config, name, task.source, base, progress, point)
    return Outcome(task, "trained", run)


def _answer_config(config: LoraTrainConfig, json: bool) -> None:
    if json:
        render.answer_json(config.model_dump(mode="json"))
    else:
        render.answer(dump(config).rstrip())


def _report(outcomes: Sequence[Outcome], json: bool) -> None:
    """The answer; then LoragenError for what failed, or what was interrupted.

    The first process of a launcher alone tells: one that left with an error while the first still
    writes its results would have torchrun end that too.
    """
    if not render.is_first_process():
        return
    if json:
        render.answer_json([_document(outcome) for outcome in outcomes])
    else:
        for outcome in outcomes:
            if outcome.run:
                render.answer(str(outcome.run.directory))
    if len(outcomes) > 1:
        render.note(_summary(outcomes))
    _raise_for(outcomes)


def _raise_for(outcomes: Sequence[Outcome]) -> None:
    stopped = [one for one in outcomes if one.status == "interrupted"]
    failed = [one for one in outcomes if one.status == "failed"]
    lines = [f"{one.task.name}: {line}" for one in stopped + failed for line in _reasons(one)]
    errors = [one.error for one in failed if isinstance(one.error, Exception)]
    cause = ExceptionGroup("one a dataset", errors) if errors else None  # for --debug
    if stopped:
        raise Interrupted(*lines) from cause
    if failed:
        raise LoragenError(*lines) from cause


def _reasons(outcome: Outcome) -> Sequence[str]:
    """One line per problem."""
    error = outcome.error
    return error.problems if isinstance(error, LoragenError) else [outcome.reason]


def _document(outcome: Outcome) -> dict[str, Any]:
    if outcome.run:
        run = {"run": str(outcome.run.directory), **outcome.run.manifest.model_dump()}
        return {**run, "outcome": outcome.status}
    task = outcome.task
    return {
        "run": None,
        "status": outcome.status,
        "dataset": {"name": task.name, "path": str(task.source)},
        "outcome": outcome.status,
        "reason": outcome.reason,
    }


def _summary(outcomes: Sequence[Outcome]) -> str:
    rows = []
    for outcome in outcomes:
        manifest = outcome.run.manifest if outcome.run else None
        seconds = manifest.seconds if manifest and outcome.status == "trained" else None
        loss = manifest.final_loss if manifest else None
        what = None if outcome.error else outcome.reason  # an error has a line of its own
        what = str(outcome.run.directory) if outcome.run else what
        rows.append((outcome.task.name, outcome.status, loss, seconds, what))
    return render.columns(("dataset", "status", "loss", "seconds", "run"), rows)


def _shorten(config: LoraTrainConfig) -> None:
    """`--test-mode`"""
    first, *_, last = TEST_MODE_STEPS
    config.training.max_steps = last
    config.checkpoints.first_step = first
    if "stage1_steps" in config.schedule.options:
        config.schedule = config.schedule.model_copy(update={"stage1_steps": first - 1})
