"""`loragen sweep`: search the settings of a training, by what it validates."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loragen.cli import completion, gen, lora, options, render
from loragen.core.errors import LoragenError, UsageError
from loragen.core.progress import is_first_process

if TYPE_CHECKING:
    from pydantic import BaseModel

    from loragen.core.config import Override
    from loragen.core.learning.sweep.study import Study, StudyRecord
    from loragen.core.learning.sweep.trainings import SweptTraining

app = typer.Typer(
    no_args_is_help=True,
    help="Search the settings of a training with Optuna, by a validation metric.",
)
lora_app = typer.Typer(no_args_is_help=True, help="Search the settings of lora train.")
gen_app = typer.Typer(no_args_is_help=True, help="Search the settings of gen train.")
app.add_typer(lora_app, name="lora")
app.add_typer(gen_app, name="gen")

Params = Annotated[
    list[str] | None,
    typer.Option(
        "--param",
        metavar="KEY=RANGE",
        help="Search a setting: log:1e-5:1e-3, float:0:0.3, int:4:32 (or int:4:32:4, in steps), "
        "logint:4:64, choice:A,B. Repeatable.",
        autocompletion=completion.settings,
    ),
]
Trials = Annotated[
    int, typer.Option("--trials", min=1, help="The trials of the study, of all processes together.")
]
StudyDir = Annotated[
    Path | None,
    typer.Option(
        "--study",
        help="The directory of the study. The same command goes on with it, also while others "
        "work on it. Default: one in sweeps/.",
    ),
]
MetricName = Annotated[
    str, typer.Option("--metric", help="The validation metric that chooses: val/...")
]
Direction = Annotated[
    str | None,
    typer.Option(
        "--direction",
        metavar="minimize|maximize",
        help="Default: maximize an accuracy, minimize all others.",
    ),
]
StartupTrials = Annotated[
    int,
    typer.Option(
        "--startup-trials",
        min=1,
        help="Trials at random before the search learns from them, and before one is pruned.",
    ),
]
Pruning = Annotated[
    bool,
    typer.Option(
        "--prune/--no-prune",
        help="End a trial that is worse than the median of the others at the same step.",
    ),
]


@lora_app.command("train")
def sweep_lora(
    param: Params = None,
    trials: Trials = 20,
    study: StudyDir = None,
    metric: MetricName = "val/loss",
    direction: Direction = None,
    startup_trials: StartupTrials = 5,
    prune: Pruning = True,
    dataset: lora.Datasets = None,
    config: options.ConfigFile = None,
    base_model: options.BaseModelName = None,
    trust_remote_code: options.TrustRemoteCode = False,
    data_root: options.OtherDataRoot = None,
    skip_bad_rows: options.SkipBadRows = False,
    batch_size: lora.BatchSize = None,
    runs_dir: lora.RunsDir = None,
    track_batches: lora.TrackBatches = False,
    dry_run: options.DryRun = False,
    settings: options.Settings = None,
    json: options.Json = False,
) -> None:
    """Search the settings of lora train on one dataset, by a validation metric.

    Needs validation rows: --set data.val_ratio=0.1. Every trial is a run that runs list shows.
    Prints the file with the best settings, for lora train --config. See docs/sweeps.md.
    """
    from loragen.core.config import LoraTrainConfig
    from loragen.core.learning.sweep.trainings import SweptLora

    flags = lora.lora_flags(
        base_model,
        trust_remote_code,
        data_root,
        skip_bad_rows,
        batch_size,
        runs_dir,
        track_batches,
    )
    load, given = _layers(LoraTrainConfig, config, settings, flags)
    _sweep(
        SweptLora(load, given, dataset or ()),
        param or [],
        trials,
        study,
        {"metric": metric, "direction": direction},
        {"startup_trials": startup_trials, "pruning": prune},
        dry_run,
        json,
    )


@gen_app.command("train")
def sweep_gen(
    param: Params = None,
    trials: Trials = 20,
    study: StudyDir = None,
    metric: MetricName = "val/loss",
    direction: Direction = None,
    startup_trials: StartupTrials = 5,
    prune: Pruning = True,
    config: options.ConfigFile = None,
    checkpoint_dir: gen.CheckpointDirs = None,
    prompts: gen.Prompts = None,
    trust_remote_code: options.TrustRemoteCode = False,
    dry_run: options.DryRun = False,
    settings: options.Settings = None,
    json: options.Json = False,
) -> None:
    """Search the settings of gen train, by a validation metric.

    Every trial is an experiment that runs list shows. Prints the file with the best settings, for
    gen train --config. See docs/sweeps.md.
    """
    from loragen.core.config import GenTrainConfig
    from loragen.core.learning.sources import check_sources
    from loragen.core.learning.sweep.trainings import SweptGenerator

    flags = gen.generator_flags(checkpoint_dir, prompts, trust_remote_code)
    load, given = _layers(GenTrainConfig, config, settings, flags, check=check_sources)
    _sweep(
        SweptGenerator(load, given),
        param or [],
        trials,
        study,
        {"metric": metric, "direction": direction},
        {"startup_trials": startup_trials, "pruning": prune},
        dry_run,
        json,
    )


def _layers(
    model: "type[BaseModel]",
    file: Path | None,
    settings: list[str] | None,
    flags: "list[Override]",
    **check: Any,
) -> "tuple[Callable[[Sequence[Override]], Any], set[str]]":
    """Returns how the command line is configured with further settings, and the keys that it sets
    itself. A file of the original scripts is translated once."""
    from loragen.core.config import load

    translated: Any = file

    def configured(values: "Sequence[Override]") -> Any:
        def use(found: Any) -> Any:
            nonlocal translated
            every = [*flags, *values]
            made: Any = load(model, deepcopy(found), settings or (), every, **check)
            translated = found
            return made

        return options.with_old_files(model, file, use) if translated is file else use(translated)

    given = {text.partition("=")[0].strip() for text in settings or ()}
    return configured, given | {".".join(map(str, flag.keys)) for flag in flags}


def _sweep(
    training: "SweptTraining[Any]",
    texts: Sequence[str],
    wanted: int,
    directory: Path | None,
    objective: dict[str, Any],
    search: dict[str, Any],
    dry_run: bool,
    json: bool,
) -> None:
    """Checks everything, takes part in the study until it has its trials, and prints the best."""
    from loragen.core.config import dump
    from loragen.core.learning.sweep.space import parse_params
    from loragen.core.learning.sweep.study import Study, StudyRecord, check_study, run_trials
    from loragen.core.learning.sweep.trainings import usual_direction

    if not is_first_process():
        raise UsageError("a sweep trains on one device: start it without torchrun, once a device")
    direction = objective["direction"] or usual_direction(objective["metric"])
    if direction not in ("minimize", "maximize"):
        raise UsageError(f"--direction {direction}: expected minimize or maximize")
    params, problems = parse_params(texts)
    base = training.check(params, problems, objective["metric"])
    record = StudyRecord(
        command=training.command,
        metric=objective["metric"],
        direction=direction,
        space={param.key: param.spec for param in params},
        inputs=training.inputs(base),
        seed=base.seed,
        **search,
    )
    place = directory or Path("sweeps") / training.name
    if dry_run:
        check_study(place, record, training, base)
        render.note(f"{record.direction} {record.metric} in {place}")
        for param in params:
            render.note(f"{param.key}: {param.spec}")
        render.answer_either(json, base.model_dump(mode="json"), dump(base).rstrip())
        return

    from loragen.cli.progress import terminal_progress

    with Study.open(place, record, params, training, base) as opened:
        run_trials(opened, training, wanted, terminal_progress())
        _report(opened, record, json)


def _report(study: "Study", record: "StudyRecord", json: bool) -> None:
    """Prints the trials and the best. Raises LoragenError if there is none."""
    from dataclasses import asdict

    from loragen.core.learning.sweep.study import BEST, best_of

    found = study.trials()
    best = best_of(found, record.direction)
    keys = list(record.space)
    rows = [
        (str(t.number), t.state, t.value, *(t.params.get(key) for key in keys), t.run or t.problem)
        for t in found
    ]
    render.note(render.columns(("trial", "state", record.metric, *keys, "run"), rows))
    running = [trial for trial in found if trial.state == "running"]
    if running:
        render.note(f"{len(running)} more are being trained by other processes")
    file = study.directory / BEST
    if json:
        render.answer_json(
            {
                "study": str(study.directory),
                "command": record.command,
                "metric": record.metric,
                "direction": record.direction,
                "config": str(file) if best else None,
                "best": asdict(best) if best else None,
                "trials": [asdict(trial) for trial in found],
            }
        )
    elif best:
        render.answer(str(file))
    if best is None and not running:
        raise LoragenError(f"{study.directory}: no trial has finished; see the reasons above")
