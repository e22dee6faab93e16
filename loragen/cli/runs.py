"""`loragen runs`: what ran, which was better, why; following a run, and removing one."""

import shutil
import sys
from enum import StrEnum
from fnmatch import fnmatch
from math import inf, isnan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loragen.cli import completion, options, render
from loragen.cli.config import Command
from loragen.core.errors import EXIT_FAILED, EXIT_INTERRUPTED, UsageError, counted, shortened
from loragen.core.run.history.summary import duration_text, size_text

if TYPE_CHECKING:
    from loragen.core.run.history.comparison import OpenedRun
    from loragen.core.run.history.summary import ListedRun

app = typer.Typer(
    no_args_is_help=True,
    help="Look at the runs of lora train and gen train: list, show, compare, follow, remove them.",
)

WIDTH = 100
"""Columns of what is drawn where stdout is no terminal."""
NARROW_FIRST = ("command", "dataset", "base", "age", "size", "metric")
"""Columns that a table leaves out on a narrow terminal, in this order."""

Run = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="A run directory, or the name of one in runs/ or experiments/.",
        autocompletion=completion.every_run,
    ),
]
Runs = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN...",
        help="Run directories, or names of those in runs/ or experiments/.",
        autocompletion=completion.every_run,
    ),
]
Metrics = Annotated[
    list[str] | None,
    typer.Option(
        "--metric",
        "-m",
        help="Draw this metric. Repeatable. Default: train/loss and the one that is validated.",
    ),
]


class StateName(StrEnum):
    running = "running"
    finished = "finished"
    failed = "failed"
    interrupted = "interrupted"
    unreadable = "unreadable"


class Order(StrEnum):
    started = "started"
    name = "name"
    state = "state"
    dataset = "dataset"
    base = "base"
    steps = "steps"
    best = "best"
    size = "size"
    seconds = "seconds"


@app.command("list")
def runs_list(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FOLDER]...",
            help="Folders of runs. Default: runs/ and experiments/.",
        ),
    ] = None,
    state: Annotated[
        list[StateName] | None, typer.Option("--state", help="Only runs of this state. Repeatable.")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option("--dataset", metavar="NAME", help="Only runs of this dataset; * and ? match."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="NAME", help="Only runs of this base model; * and ? match."),
    ] = None,
    command: Annotated[
        Command | None, typer.Option("--command", help="Only runs of lora train, or of gen train.")
    ] = None,
    sort: Annotated[
        Order,
        typer.Option(
            "--sort", help="started: newest first; best: lowest first; size and steps: most first."
        ),
    ] = Order.started,
    reverse: Annotated[bool, typer.Option("--reverse", "-r", help="The other way round.")] = False,
    limit: Annotated[
        int | None, typer.Option("--limit", "-n", min=1, help="At most so many, after sorting.")
    ] = None,
    json: options.Json = False,
) -> None:
    """List runs with their state, dataset, base, steps, best metric, size and age.

    A run whose process is gone is interrupted, not running, also if it could not say so. The best
    value is the lowest of the metric that is validated; without a validation, it is the last
    training loss.

    What was read of a run is kept in .loragen-runs.json of its folder, which may be deleted.
    """
    from loragen.core.run.history.listing import default_folders, list_runs

    for folder in folders or ():
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such directory")
    given = folders or default_folders()
    found = [
        run
        for run in list_runs(given)
        if (not state or run.state in state)
        and (not dataset or any(fnmatch(one, dataset) for one in run.datasets))
        and (not base or _is_base(run.base_model, base))
        and (not command or run.command == f"{command} train")
    ]
    found.sort(key=lambda run: (_rank(run, sort), run.name))
    if reverse:
        found.reverse()
    shown = found[:limit]
    if json:
        render.answer_json({"runs": [run.document() for run in shown]})
        return
    if not shown:
        where = " and ".join(str(folder) for folder in given)
        chosen = state or dataset or base or command
        render.note(f"{where}: no runs there{' of that kind' if chosen else ''}")
        return
    render.answer(_table(shown))
    for run in shown:
        if run.problem:
            render.note(f"{run.path}: its manifest {_with_verb(run.problem)}")


@app.command("show")
def runs_show(run: Run, metric: Metrics = None, json: options.Json = False) -> None:
    """Show one run: what it learned from, how far it got, its metrics and their curves, and the
    settings that are not the defaults."""
    from loragen.core.run.history.comparison import (
        OpenedRun,
        changed_settings,
        chosen_metrics,
    )
    from loragen.core.run.history.listing import find_run

    found = find_run(run)
    opened = OpenedRun(found)
    drawn = chosen_metrics([opened], metric or [])
    changed = changed_settings(opened)
    if json:
        render.answer_json(
            {
                **found.document(),
                "manifest": opened.manifest,
                "settings": opened.settings,
                "changed_settings": changed,
                "metrics": _metric_documents(opened),
            }
        )
        return
    render.answer(f"{found.name}\n{_facts(opened)}")
    if rows := _metric_rows([opened], list(opened.curves)):
        render.answer("\n" + render.columns(["metric", "last", "lowest", "at step"], rows))
    if changed:
        lines = render.columns(
            ["setting", "value"], [[k, _value(v, 60)] for k, v in changed.items()]
        )
        render.answer(f"\n{lines}")
    _draw([opened], drawn)


@app.command("compare")
def runs_compare(runs: Runs, metric: Metrics = None, json: options.Json = False) -> None:
    """Compare runs: the settings in which they differ, their metrics, and their curves in one
    chart each."""
    from loragen.core.run.history.comparison import (
        OpenedRun,
        chosen_metrics,
        differing_settings,
        run_labels,
    )
    from loragen.core.run.history.listing import find_run

    if len(set(runs)) < 2:
        raise UsageError("compare needs two runs at least; `loragen runs show RUN` shows one")
    opened = [OpenedRun(find_run(one)) for one in dict.fromkeys(runs)]
    drawn = chosen_metrics(opened, metric or [])
    found = differing_settings(opened)
    if json:
        render.answer_json(
            {
                "runs": [
                    {**one.run.document(), "metrics": _metric_documents(one)} for one in opened
                ],
                "differences": found,
            }
        )
        return
    labels = run_labels(len(opened))
    header = ["", "run", "state", "steps", "best", "metric", "seconds"]
    rows = [
        [
            label,
            one.run.name,
            one.run.state,
            _steps(one.run),
            one.run.best,
            one.run.metric or None,
            one.run.seconds,
        ]
        for label, one in zip(labels, opened, strict=True)
    ]
    render.answer(render.columns(header, rows))
    if found:
        widest = max(12, (_width() - 34) // len(opened) - 2)
        settings = [[key, *(_value(v, widest) for v in values)] for key, values in found.items()]
        render.answer("\n" + render.columns(["setting", *labels], settings))
    else:
        render.answer("\nNo setting differs.")
    if len(drawn) and (lowest := _metric_rows(opened, drawn)):
        render.answer("\n" + render.columns(["lowest, and last", *labels], lowest))
    _draw(opened, drawn)


@app.command("report")
def runs_report(
    runs: Runs,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The page to write.")
    ] = Path("report.html"),
    evaluation: Annotated[
        list[Path] | None,
        typer.Option(
            "--evaluation",
            "-e",
            metavar="PATH",
            help="The --output of gen eval, or its results.json. Repeatable. Those beside a "
            "generator that name it are found without.",
        ),
    ] = None,
    metric: Metrics = None,
    checkpoints: Annotated[
        bool, typer.Option(help="Analyse the checkpoints of runs of lora train, 8 of each.")
    ] = True,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Write a page about runs: settings, curves, checkpoints, evaluations and their origin.

    The page is one file that needs no network. No base model is loaded.
    """
    from loragen.cli.progress import checkpoint_progress
    from loragen.core.evaluation.runs_report import RunsReport, find_evaluations, with_checkpoints
    from loragen.core.outputs import is_sealed, refuse_existing_file, refuse_input
    from loragen.core.page import need_library
    from loragen.core.run.history.comparison import OpenedRun, chosen_metrics
    from loragen.core.run.history.listing import find_run

    opened = [OpenedRun(find_run(one)) for one in dict.fromkeys(runs)]
    refuse_input(output, [*(evaluation or ()), *(one.run.path for one in opened)])
    refuse_existing_file(output, force, is_sealed)
    need_library("runs report")
    chosen_metrics(opened, metric or [])
    report = RunsReport(
        opened,
        find_evaluations(opened, evaluation or []),
        metric or [],
        with_checkpoints(opened) if checkpoints else [],
    )
    report.page(checkpoint_progress()).write(output)
    if json:
        render.answer_json(
            {
                "page": str(output),
                "runs": [one.run.name for one in opened],
                "evaluations": [str(one.file) for one in report.evaluations],
            }
        )
    else:
        render.note(f"wrote {output}")


@app.command("watch")
def runs_watch(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN]",
            help="A run directory, or the name of one. Default: the newest that is running.",
            autocompletion=completion.every_run,
        ),
    ] = None,
    every: Annotated[
        float,
        typer.Option("--every", metavar="SECONDS", min=0.1, help="How often its files are read."),
    ] = 1.0,
    json: options.Json = False,
) -> None:
    """Follow a run that another process trains, here or on another machine, until it ends.

    Steps and validations are shown as the training shows them, and the end as `runs list` does.
    The exit code is 1 if the run does not finish. Ctrl+C stops the watching, not the run.
    """
    from loragen.cli.progress import terminal_progress
    from loragen.core.run.history.following import follow
    from loragen.core.run.history.listing import default_folders, find_run, list_runs

    if run is None:
        alive = [one for one in list_runs(default_folders()) if one.state == "running"]
        if not alive:
            raise UsageError("no run is running in runs/ or experiments/; name one")
        found = max(alive, key=lambda one: (one.started, one.name))
    else:
        found = find_run(run)
    progress = terminal_progress()
    try:
        found = follow(found, progress, every)
    except KeyboardInterrupt:
        # Not typer.Exit: after an interrupt, the root command reports any exception.
        raise SystemExit(EXIT_INTERRUPTED) from None
    finally:
        progress.command_ended()
    if json:
        render.answer_json(found.document())
    else:
        render.answer(_table([found]))
    if found.state != "finished":
        raise typer.Exit(EXIT_FAILED)


@app.command("rm")
def runs_rm(
    runs: Runs,
    checkpoints: Annotated[
        bool,
        typer.Option(
            "--checkpoints",
            help="Remove checkpoints alone: all but the last of an adapter, and those of a "
            "generator that has its file.",
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be removed; remove nothing.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Remove runs: what loragen has written, and nothing else.

    Files of others stay, with the directories that they are in. A run that is being written is
    refused. Without --yes the command asks on a terminal, and is refused elsewhere.
    """
    from loragen.core.run.history.listing import find_run
    from loragen.core.run.removal import plan_removal

    found = [find_run(one) for one in dict.fromkeys(runs)]
    for one in found:
        if one.writer:
            raise UsageError(f"{one.path} is being written by {one.writer}; it is not removed")
        if one.problem:
            raise UsageError(f"{one.path}: its manifest {_with_verb(one.problem)}")
    plans = [
        plan_removal(one.path, one.kind, one.state == "finished", checkpoints) for one in found
    ]
    sizes = {plan.directory: plan.size for plan in plans}
    size = sum(sizes.values())
    what = "checkpoints of " if checkpoints else ""
    if not json or not (yes or dry_run):
        for plan in plans:
            files = counted(len(plan.files) + (not checkpoints), "file")
            render.note(f"{plan.directory}: {files}, {size_text(plan.size)}")
            for kept in plan.kept:
                render.note(f"{kept} stays: loragen has not written it, or it has changed since")
    if not (yes or dry_run):
        question = f"Remove {what}{counted(len(plans), 'run')}, {size_text(size)}?"
        if not _can_ask():
            raise UsageError(f"{question} Nobody can be asked here: add --yes")
        if not typer.confirm(question, err=True):
            raise typer.Exit(EXIT_FAILED)
    if not dry_run:
        for plan in plans:
            plan.run()
    if json:
        documents = [
            {
                "path": str(plan.directory),
                "files": len(plan.files) + (not checkpoints),
                "size_bytes": sizes[plan.directory],
                "kept": [str(path) for path in plan.kept],
            }
            for plan in plans
        ]
        render.answer_json({"removed": not dry_run, "size_bytes": size, "runs": documents})
    else:
        done = "would be freed" if dry_run else "freed"
        render.answer(f"{size_text(size)} {done}")


# ---------------------------------------------------------------------------- texts


def _table(runs: "list[ListedRun]") -> str:
    """Returns the table of runs, on a terminal without columns for which it is too narrow."""
    header = [
        "name",
        "state",
        "command",
        "dataset",
        "base",
        "steps",
        "best",
        "metric",
        "size",
        "age",
    ]
    rows = [
        [
            run.name,
            run.state,
            run.command or None,
            _datasets(run),
            _base(run.base_model),
            _steps(run),
            run.best,
            run.metric or None,
            size_text(run.size),
            duration_text(run.age),
        ]
        for run in runs
    ]
    text = render.columns(header, rows)
    for name in NARROW_FIRST:
        if not sys.stdout.isatty() or max(map(len, text.splitlines())) <= _width():
            break
        at = header.index(name)
        header.pop(at)
        for row in rows:
            row.pop(at)
        text = render.columns(header, rows)
    return text


def _facts(opened: "OpenedRun") -> str:
    """Returns the lines of `show` about a run."""
    run, manifest = opened.run, opened.manifest
    dataset = manifest.get("dataset")
    told: dict[str, object] = {
        "state": run.state,
        "written by": run.writer,
        "command": run.command or None,
        "directory": run.path,
        "problem": run.problem or None,
        "datasets" if run.kind == "generator" else "dataset": ", ".join(run.datasets) or None,
        "base": run.base_model or None,
        "started": run.started or None,
        "took": None if run.seconds is None else duration_text(run.seconds),
        "steps": _steps(run),
        "size": size_text(run.size),
    }
    if isinstance(dataset, dict) and dataset.get("path"):
        told["rows"] = f"{dataset.get('rows')} of {dataset['path']}"
    if manifest.get("resumed_from"):
        told["resumed at step"] = ", ".join(map(str, manifest["resumed_from"]))
    if manifest.get("logger_run_ids"):
        told["loggers"] = ", ".join(f"{k} {v}" for k, v in manifest["logger_run_ids"].items())
    if run.state == "interrupted":
        told["to resume"] = f"loragen {run.command} --resume {run.path}"
    lines = {name: str(value) for name, value in told.items() if value is not None}
    indent = max(map(len, lines)) + 2
    return "\n".join(render.visible(f"  {k:<{indent}}{v}") for k, v in lines.items())


def _metric_rows(opened: "list[OpenedRun]", names: list[str]) -> list[list[object]]:
    """Returns a row for each metric: of one run the last value, the lowest and its step; of several
    the lowest and the last of each."""
    from loragen.core.run.history.comparison import last_and_lowest

    rows: list[list[object]] = []
    for name in names:
        values = [last_and_lowest(one, name) for one in opened]
        if len(opened) == 1 and values[0]:
            rows.append([name, *values[0]])
        elif len(opened) > 1:
            cells = [f"{v[1]:.4g} @ {v[2]}, {v[0]:.4g}" if v else None for v in values]
            rows.append([name, *cells])
    return rows


def _metric_documents(opened: "OpenedRun") -> dict[str, Any]:
    from loragen.core.run.history.comparison import last_and_lowest

    found = {}
    for name, (steps, values) in opened.curves.items():
        last, lowest, at = last_and_lowest(opened, name) or (None, None, None)
        found[name] = {
            "last": last,
            "lowest": lowest,
            "lowest_step": at,
            "steps": steps,
            "values": values,
        }
    return found


def _draw(opened: "list[OpenedRun]", names: list[str]) -> None:
    """Prints the curves that have two points at least."""
    from loragen.cli.curves import charts
    from loragen.core.run.history.comparison import run_labels

    labels = run_labels(len(opened))
    drawn = {
        name: {
            label: one.curves[name]
            for label, one in zip(labels, opened, strict=True)
            if len(one.curves.get(name, ((), ()))[0]) > 1
        }
        for name in names
    }
    if any(drawn.values()):
        render.answer("\n" + charts({k: of for k, of in drawn.items() if of}, _width()))


def _width() -> int:
    return shutil.get_terminal_size((WIDTH, 24)).columns


def _is_base(recorded: str, wanted: str) -> bool:
    return fnmatch(recorded, wanted) or fnmatch(Path(recorded).name, wanted)


def _rank(run: "ListedRun", order: Order) -> Any:
    """Returns the key by which runs are sorted; what is not known comes last."""
    if order == Order.started:
        return inf if isnan(run.age) else run.age
    if order == Order.best:
        return run.best is None, run.metric, run.best or 0.0
    values: dict[Order, Any] = {
        Order.name: run.name,
        Order.state: run.state,
        Order.dataset: run.datasets,
        Order.base: run.base_model,
        Order.steps: -run.step,
        Order.size: -run.size,
        Order.seconds: -(run.seconds or 0.0),
    }
    return values[order]


def _datasets(run: "ListedRun") -> str | None:
    if len(run.datasets) > 1:
        return f"{len(run.datasets)} datasets"
    return shortened(run.datasets[0], 24) if run.datasets else None


def _base(name: str) -> str | None:
    """Returns the name of a base: of a path the last part."""
    return shortened(Path(name).name if Path(name).is_absolute() else name, 32) or None


def _steps(run: "ListedRun") -> str:
    return f"{run.step}/{run.max_steps}" if run.max_steps else str(run.step)


def _can_ask() -> bool:
    return sys.stdin.isatty()


def _value(value: object, widest: int) -> str | None:
    from loragen.core.config.yaml_file import inline

    return None if value is None else shortened(inline(value), widest)


def _with_verb(problem: str) -> str:
    """Returns what is wrong with a manifest: `is damaged: ...`, `cannot be read: ...`."""
    verb = "" if problem.startswith("cannot") else "has " if problem.startswith("format") else "is "
    return f"{verb}{problem}"
