"""Runs the experiment of an example from nothing, and writes its tables.

    python examples/real-tasks/run.py --output real-tasks-out            # hours on two cores
    python examples/real-tasks/run.py --output quick-out --quick         # 12 + 4 tasks, one fold
    python examples/real-tasks/run.py --example examples/commonsense --tasks data_to_lora/cs \\
        --output commonsense-out                                         # another experiment

An example is a directory with `experiment.yaml` (what is held out and measured, see `Design`),
`lora.yaml` (how adapters are trained) and `generator.yaml` (how generators are).

Five stages: the tasks are written (or --tasks read), the base model is fetched (or --model read),
an adapter is collected for every task, a generator is trained for each fold and evaluated on the
tasks that it has not seen, and the folds are combined. What is in --output already is not made
again, so the same command goes on after an interruption. `results.md`, `results.json` and
`results.png` lie in --output, the messages of every command in its `logs/`.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from math import ceil
from pathlib import Path
from statistics import fmean
from threading import Lock
from typing import Any

import yaml

import loragen
from loragen.core.data.dataset import dataset_names
from loragen.core.evaluation.report import worth_in_labels
from loragen.core.evaluation.statistics import combine
from loragen.core.files import write_json, write_text

HERE = Path(__file__).parent
LORAGEN = [sys.executable, "-m", "loragen"]

COLUMNS = (
    *("base", "few_shot", "mean", "nearest", "ridge", "arrow", "multi_task", "best_single"),
    *("other_prompts", "gibberish_prompts", "generated", "oracle"),
)
CURVE_COLUMNS = (
    *("base", "labels_5", "labels_10", "labels_20", "labels_50", "labels_100"),
    *("generated", "oracle"),
)
TO_BEAT = ("nearest", "multi_task", "ridge", "arrow", "few_shot")
POSITIVE_MARGINS = 0.80
ADAPTERS_AT_ONCE = 4
"""The most adapters that one process trains, so that the base is loaded for several."""


@dataclass(frozen=True)
class Design:
    """What an example measures: the content of its `experiment.yaml`."""

    split: str
    """The split that is tested."""
    prompts_from: str
    """Where the prompts of a held-out task come from: train or tested."""
    rows: int
    """Tested rows of a task, at most."""
    draws: int
    """Draws of prompts."""
    prompts: int
    """Prompts of a draw."""
    multi_task_steps: int
    """The most steps of each of the three trainings of `multi_task`."""
    folds: int | None = None
    """Folds that hold out every task once; null: every task is held out alone."""
    far: Sequence[str] = ()
    """Families that are held out as a whole, if there are tasks of them."""
    curve_tasks: int = 0
    """Tasks of each of the first folds for which the label curve is measured."""
    recovered: Mapping[str, float] = field(default_factory=dict)
    """The share of the headroom that is aimed at, {near or far: share}."""
    most_tasks: int | None = None
    """Only so many tasks, of the largest families."""
    most_folds: int | None = None
    """Only the first so many folds."""
    generator: Sequence[str] = ()
    """More settings of `gen train`, key=value."""

    @classmethod
    def of(cls, example: Path, quick: bool) -> "Design":
        """Reads the design of an example; --quick replaces what its section `quick` names."""
        document = yaml.safe_load((example / "experiment.yaml").read_text(encoding="utf-8"))
        changes = document.pop("quick")
        return replace(cls(**document), **(changes if quick else {}))


@dataclass(frozen=True)
class Fold:
    """A generator: the tasks that it is trained on, and those that it is evaluated on."""

    protocol: str
    """near, far or leave-one-out"""
    name: str
    training: Sequence[str]
    held_out: Sequence[str]


@dataclass
class Experiment:
    """The files of an experiment, and the commands that write them."""

    output: Path
    jobs: int
    """The most commands that run at a time."""
    settings: dict[str, Any]
    """What decides the results; the same in every call with this output."""
    seconds: dict[str, float] = field(default_factory=dict)
    """The seconds of every command, over all calls that have ended."""
    running: int = 1
    """The commands that run at a time in this stage; they share the cores."""
    timing: Lock = field(default_factory=Lock)
    """Held while `seconds` is changed and written."""

    def __post_init__(self) -> None:
        (self.output / "logs").mkdir(parents=True, exist_ok=True)
        file = self.output / "settings.json"
        if not file.is_file():
            write_json(file, {"commit": commit(), **self.settings})
        begun = json.loads(file.read_text(encoding="utf-8"))
        if changed := [key for key, value in self.settings.items() if begun.get(key) != value]:
            raise SystemExit(
                f"{self.output}: begun with other settings ({', '.join(changed)}); give another "
                "--output, or delete it"
            )
        self.settings = begun
        if self.times.is_file():
            self.seconds = json.loads(self.times.read_text(encoding="utf-8"))

    @property
    def seed(self) -> int:
        seed: int = self.settings["seed"]
        return seed

    @property
    def times(self) -> Path:
        return self.output / "seconds.json"

    def run(self, name: str, command: Sequence[str]) -> str:
        """Runs a command with its messages in `logs/NAME.log`; returns its stdout. Raises
        SystemExit if it fails."""
        threads = str(max(1, (os.cpu_count() or 1) // self.running))
        log = self.output / "logs" / f"{name}.log"
        started = time.perf_counter()
        with log.open("a", encoding="utf-8") as messages:
            messages.write(f"$ {shlex.join(command)}\n")
            messages.flush()
            done = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                stderr=messages,
                encoding="utf-8",
                check=False,
                # Threads of several processes that wait for each other on busy cores slow all down.
                env={"OMP_NUM_THREADS": threads, **os.environ, "PYTHONUTF8": "1"},
            )
        with self.timing:
            took = self.seconds.get(name, 0.0) + time.perf_counter() - started
            self.seconds[name] = round(took, 1)
            write_json(self.times, self.seconds)
        if done.returncode:
            last = log.read_text(encoding="utf-8").splitlines()[-5:]
            raise SystemExit("\n".join([f"{name} failed, see {log}:", *last]))
        return done.stdout

    def run_all(self, stage: str, work: Mapping[str, Any]) -> dict[str, Any]:
        """Calls every function of {name: function}, several at a time; returns their results.
        Reports the seconds of each, and the estimate for those that are left."""
        started, done = time.perf_counter(), 0
        self.running = max(1, min(self.jobs, len(work)))
        say(f"{stage}: {len(work)} to do, {self.running} at a time")
        pool = ThreadPoolExecutor(self.running)

        def timed(name: str) -> Any:
            nonlocal done
            result, done = work[name](), done + 1
            elapsed = time.perf_counter() - started
            left = (len(work) - done) * elapsed / done
            say(f"{stage}: {name} done, {done}/{len(work)}; {minutes(elapsed, left)}")
            return result

        tasks = {name: pool.submit(timed, name) for name in work}
        try:
            wait(tasks.values(), return_when=FIRST_EXCEPTION)
            failed = [one for one in tasks.values() if one.done() and one.exception()]
            if failed:
                say(f"{stage}: a command has failed; waiting for those that are running")
        finally:
            pool.shutdown(cancel_futures=True)
        for one in failed:
            one.result()  # raises
        return {name: task.result() for name, task in tasks.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Runs an experiment and writes its tables.")
    parser.add_argument("--output", type=Path, required=True, help="the directory of all files")
    parser.add_argument("--example", type=Path, default=HERE, help="the directory of the example")
    parser.add_argument("--tasks", type=Path, help="tasks; default: those of make_tasks.py")
    parser.add_argument("--model", help="a base model; default: that of fetch_model.py")
    parser.add_argument("--quick", action="store_true", help="fewer folds, fewer steps")
    parser.add_argument("--far", help="families held out as a whole, with commas")
    parser.add_argument("--seed", type=int, default=0, help="of all trainings and draws")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes")
    options = parser.parse_args(arguments)
    if not options.tasks and options.example.resolve() != HERE.resolve():
        raise SystemExit(f"--tasks is missing: {options.example} has no tasks of its own")
    files = [options.example / f"{name}.yaml" for name in ("experiment", "lora", "generator")]
    settings = {
        "quick": options.quick,
        "seed": options.seed,
        "tasks": str(options.tasks.absolute()) if options.tasks else None,
        "model": options.model,
        "far": options.far,
        **{file.stem: file.read_text(encoding="utf-8") for file in files},
    }
    design = Design.of(options.example, options.quick)
    if options.far:
        design = replace(design, far=options.far.split(","))
    experiment = Experiment(options.output.absolute(), options.jobs, settings)
    started = time.perf_counter()
    tasks = options.tasks or written_tasks(experiment)
    families = largest_families(families_of(tasks), design.most_tasks)
    folds = near_folds(families, design.folds)[: design.most_folds]
    folds += far_folds(families, design.far, strict=bool(options.far))
    model = options.model or fetched_model(experiment)
    held = Counter(fold.protocol for fold in folds for _ in fold.held_out)
    say(
        f"adapters: {len(families)}; generators: {len(folds)}; held-out tasks: "
        + ", ".join(f"{count} ({name})" for name, count in held.items())
    )
    runs = collected(experiment, options.example / "lora.yaml", model, tasks, sorted(families))

    def evaluated(fold: Fold) -> dict[str, Any]:
        return evaluate(experiment, design, fold, options.example / "generator.yaml", runs, tasks)

    work = {fold.name: partial(evaluated, fold) for fold in folds}
    report(experiment, design, folds, experiment.run_all("folds", work))
    print((experiment.output / "results.md").read_text(encoding="utf-8"))
    say(f"{minutes(time.perf_counter() - started)}; {experiment.output / 'results.md'}")


# ---------------------------------------------------------------------------- tasks and folds


def written_tasks(experiment: Experiment) -> Path:
    """Returns the directory of the tasks of make_tasks.py."""
    tasks = experiment.output / "tasks"
    if not (tasks / "tasks.json").is_file():
        command = [sys.executable, str(HERE / "make_tasks.py"), "--output", str(tasks)]
        experiment.run("make_tasks", command)
    return tasks


def fetched_model(experiment: Experiment) -> str:
    """Returns the directory of the model of fetch_model.py."""
    command = [sys.executable, str(HERE / "fetch_model.py")]
    return experiment.run("fetch_model", command).strip().splitlines()[-1]


def families_of(tasks: Path) -> dict[str, str]:
    """Returns {task: family}. Without a tasks.json, every dataset is a family of its own. Raises
    SystemExit if there are no tasks."""
    file = tasks / "tasks.json"
    if file.is_file():
        document = json.loads(file.read_text(encoding="utf-8"))
        return {name: one["family"] for name, one in document.items()}
    if names := dataset_names(tasks):
        return {name: name for name in names}
    raise SystemExit(f"{tasks}: no tasks; the README of the example names their format")


def in_order(families: Mapping[str, str]) -> list[str]:
    """Returns the tasks ordered by family, and within a family by the hash of their name."""
    return sorted(families, key=lambda name: (families[name], sha256(name.encode()).hexdigest()))


def largest_families(families: Mapping[str, str], most: int | None) -> dict[str, str]:
    """Returns `most` tasks, of the families with the most tasks; None: all."""
    sizes = Counter(families.values())
    ordered = sorted(in_order(families), key=lambda name: (-sizes[families[name]], families[name]))
    return {name: families[name] for name in ordered[:most]}


def near_folds(families: Mapping[str, str], count: int | None) -> list[Fold]:
    """Returns folds that hold out every task once. The i-th task in order is held out by fold
    i mod `count`, so every family is spread over the folds. None: a fold for each task."""
    ordered = in_order(families)
    if count is None:
        return [_fold("leave-one-out", name, ordered, [name]) for name in ordered]
    folds = range(min(count, len(ordered)))
    return [_fold("near", str(fold), ordered, ordered[fold::count]) for fold in folds]


def far_folds(
    families: Mapping[str, str], wanted: Sequence[str], strict: bool = False
) -> list[Fold]:
    """Returns a fold for each of the families that there are, which holds out all of its tasks.
    Raises SystemExit for an unknown family if `strict`."""
    known = sorted(set(families.values()))
    if strict and (unknown := sorted(set(wanted) - set(known))):
        raise SystemExit(f"--far {','.join(unknown)}: the families are {', '.join(known)}")
    ordered = in_order(families)
    return [
        _fold("far", family, ordered, [name for name in ordered if families[name] == family])
        for family in wanted
        if family in known
    ]


def _fold(protocol: str, name: str, tasks: Sequence[str], held_out: Sequence[str]) -> Fold:
    training = [task for task in tasks if task not in held_out]
    return Fold(protocol, f"{protocol}-{name}", training, list(held_out))


# ---------------------------------------------------------------------------- stages


def collected(
    experiment: Experiment, config: Path, model: str, tasks: Path, names: Sequence[str]
) -> dict[str, str]:
    """Returns {task: run of its adapter}. Finished runs are found again by `lora train`."""
    train = [*LORAGEN, "lora", "train", "--config", str(config), "--base-model", str(model)]
    train += ["--data-root", str(tasks), "--runs-dir", str(experiment.output / "runs"), "--json"]
    train += ["--set", f"seed={experiment.seed}"]
    file = experiment.output / "runs.json"
    known: dict[str, str] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    left = [name for name in names if not Path(known.get(name, "missing")).is_dir()]
    size = min(ADAPTERS_AT_ONCE, ceil(len(left) / experiment.jobs)) or 1
    groups = [left[i : i + size] for i in range(0, len(left), size)]

    def trained(group: Sequence[str]) -> dict[str, str]:
        datasets = [part for name in group for part in ("--dataset", name)]
        answer = json.loads(experiment.run(f"collect-{group[0]}", [*train, *datasets]))
        documents = answer if isinstance(answer, list) else [answer]
        return {one["dataset"]["name"]: one["run"] for one in documents}

    work = {", ".join(group): partial(trained, group) for group in groups}
    for runs in experiment.run_all("adapters", work).values():
        known |= runs
    write_json(file, known)
    return {name: known[name] for name in names}


def evaluate(
    experiment: Experiment,
    design: Design,
    fold: Fold,
    config: Path,
    runs: Mapping[str, str],
    tasks: Path,
) -> dict[str, Any]:
    """Trains the generator of a fold, and evaluates it on the tasks held out. Returns the results
    of `gen eval`, and under `curve` those of the label curve."""
    folder = experiment.output / "folds" / fold.name
    results = {"columns": folder / "results"}
    if design.curve_tasks and fold.protocol != "far":
        results["curve"] = folder / "curve"
    generator = ""
    for kind, directory in results.items():
        if (directory / "results.json").is_file():
            continue
        generator = generator or trained_generator(experiment, design, fold, config, runs)
        held_out = fold.held_out if kind == "columns" else fold.held_out[: design.curve_tasks]
        columns = COLUMNS if kind == "columns" else CURVE_COLUMNS
        command = [*LORAGEN, "gen", "eval", "--model", generator, "--data-root", str(tasks)]
        command += [part for name in held_out for part in ("--dataset", name)]
        command += ["--columns", ",".join(columns), "--no-choices"]
        command += ["--split", design.split, "--prompts-from", design.prompts_from]
        if "multi_task" in columns:
            command += ["--multi-task-steps", str(design.multi_task_steps)]
        command += ["--limit", str(design.rows)]
        command += ["--draws", str(design.draws), "--prompts", str(design.prompts)]
        command += ["--seed", str(experiment.seed), "--output", str(directory)]
        command += ["--cache-dir", str(experiment.output / "cache")]
        experiment.run(f"{fold.name}-{kind}", command)
    documents = {
        kind: json.loads((directory / "results.json").read_text(encoding="utf-8"))
        for kind, directory in results.items()
    }
    return {**documents["columns"], "curve": documents.get("curve")}


def trained_generator(
    experiment: Experiment,
    design: Design,
    fold: Fold,
    config: Path,
    runs: Mapping[str, str],
) -> str:
    """Returns the experiment directory of a fold's generator; an interrupted training resumes."""
    home = experiment.output / "folds" / fold.name / "experiments"
    begun = sorted(home.glob("lora_generator_*/manifest.json"))
    if begun:
        command = [*LORAGEN, "gen", "train", "--resume", str(begun[-1].parent)]
    else:
        command = [*LORAGEN, "gen", "train", "--config", str(config)]
        values = [f"seed={experiment.seed}", f"experiments_dir={home}"]
        values += [f"data.cache_dir={experiment.output / 'cache'}"]
        values += design.generator
        command += [part for value in values for part in ("--set", value)]
        command += [part for name in fold.training for part in ("--checkpoint-dir", runs[name])]
    return experiment.run(f"{fold.name}-train", command).strip().splitlines()[-1]


# ---------------------------------------------------------------------------- report


def report(
    experiment: Experiment,
    design: Design,
    folds: Sequence[Fold],
    evaluated: Mapping[str, Mapping[str, Any]],
) -> None:
    """Writes results.json, results.md and, if matplotlib is installed, results.png."""
    protocols = {
        protocol: combine([evaluated[fold.name] for fold in folds if fold.protocol == protocol])
        for protocol in dict.fromkeys(fold.protocol for fold in folds)
    }
    curves = [one["curve"] for one in evaluated.values() if one["curve"]]
    commits = dict.fromkeys([experiment.settings["commit"], commit()])
    document = {
        **experiment.settings,
        "commit": " to ".join(commits),
        "loragen": loragen.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "folds": {fold.name: list(fold.held_out) for fold in folds},
        "seconds": experiment.seconds,
        "recovered": dict(design.recovered),
        "protocols": protocols,
        "curve": combine(curves) if curves else None,
    }
    write_json(experiment.output / "results.json", document)
    write_text(experiment.output / "results.md", markdown(document))
    try:
        plot(document, experiment.output / "results.png")
    except ImportError:
        say("no results.png: matplotlib is missing (the extra `plots`)")


def markdown(document: Mapping[str, Any]) -> str:
    """Returns the tables of results.json."""
    hours = sum(document["seconds"].values()) / 3600
    made_by = f"Commit {document['commit']}, loragen {document['loragen']}, seed {document['seed']}"
    lines = [
        "# Results" + " of --quick" * document["quick"],
        "",
        f"{made_by}; {hours:.1f} hours of processes on {document['machine']}.",
        "examples/real-tasks/PROTOCOL.md defines the columns, the statistics and the targets.",
    ]
    for protocol, results in document["protocols"].items():
        recovered = document["recovered"].get(protocol)
        lines += ["", *protocol_table(protocol, results, recovered)]
        for measure in ("accuracy", "format_validity"):
            lines += task_table(results, measure)
    if document["curve"]:
        lines += ["", *curve_table(document["curve"])]
    return "\n".join(lines) + "\n"


def protocol_table(protocol: str, results: Mapping[str, Any], recovered: float | None) -> list[str]:
    """Returns the table of one protocol, a row for each column of `gen eval`, what it says, and the
    targets if there are."""
    of = {key: one["all"] for key, one in results.items() if isinstance(one, dict) and "all" in one}
    headroom = of["headroom"]
    header = ["", "exact match", "generated minus this", "recovered headroom: mean", "median"]
    lines = [f"## {protocol}: {counted(results)}", ""]
    lines += table_head([*header, "loss minus that of generated", "is above 0 on"])
    for column in results["columns"]:
        share = headroom["columns"].get(column)
        difference, margin = of["differences"].get(column), of["margins"].get(column)
        cells = [title(column), f"{of['accuracy'][column]:.3f} {span(*of['interval'][column])}"]
        cells += [signed(difference)] if difference else [""]
        cells += [f"{share['mean']:.2f}", f"{share['median']:.2f}"] if share else ["", ""]
        cells += [signed(margin), f"{margin['positive']:.0%} of tasks"] if margin else ["", ""]
        lines.append(table_row(cells))
    lines += [
        "",
        f"In brackets: 95 % intervals. Headroom: {headroom['datasets']} of {headroom['of']} tasks,",
        "on which the oracle leads the base by 0.15 or more.",
        "",
        f"- generated beats: {', '.join(map(title, of['beats'])) or 'nothing'}",
        f"- generated is beaten by: {', '.join(map(title, of['beaten_by'])) or 'nothing'}",
    ]
    if spent := results["multi_task"]:
        trained = fmean(one["seconds"] for one in spent) / 60
        generators = fmean(one["generator_seconds"] or 0.0 for one in spent) / 60
        lines.append(
            f"- for each fold, all trainings of multi task took {trained:.1f} min, "
            f"the generator's {generators:.1f} min (means)"
        )
    for what, met in targets(protocol, of, recovered) if recovered is not None else ():
        lines.append(f"- {'met' if met else '**not met**'}: {what}")
    return lines


def targets(protocol: str, of: Mapping[str, Any], recovered: float) -> list[tuple[str, bool]]:
    """Returns the targets of PROTOCOL.md for the statistics of a protocol, and if they are met."""
    found = []
    for one in TO_BEAT:
        if protocol == "near":
            found.append((f"generated beats {title(one)}", one in of["beats"]))
        else:
            found.append((f"{title(one)} does not beat generated", one not in of["beaten_by"]))
    share = of["headroom"]["columns"].get("generated", {"mean": 0.0})["mean"]
    what = f"generated recovers {recovered:.2f} of the headroom ({share:.2f})"
    found.append((what, share >= recovered))
    for control, margin in of["margins"].items():
        share = margin["positive"]
        what = f"{title(control)}: a higher loss on {POSITIVE_MARGINS:.0%} of the tasks"
        found.append((f"{what} ({share:.0%})", share >= POSITIVE_MARGINS))
    return found


def task_table(results: Mapping[str, Any], measure: str) -> list[str]:
    """Returns a measure of every held-out task that has it; nothing if none has."""
    columns = results["columns"]
    rows = [
        table_row([one["name"], *(f"{one[measure][column]:.2f}" for column in columns)])
        for one in sorted(results["datasets"], key=lambda one: one["name"])
        if measure in one
    ]
    name = "exact match" if measure == "accuracy" else title(measure)
    return ["", *table_head([name, *map(title, columns)]), *rows] if rows else []


def label_curve(curve: Mapping[str, Any]) -> dict[int, float]:
    """Returns {number of labelled rows: mean exact match of the adapters trained on them}."""
    accuracy = curve["accuracy"]["all"]
    sizes = {int(name.removeprefix("labels_")): name for name in accuracy if "labels_" in name}
    return {size: accuracy[name] for size, name in sorted(sizes.items())}


def curve_table(curve: Mapping[str, Any]) -> list[str]:
    """Returns the label curve, and where it crosses the generated adapter."""
    found, accuracy = label_curve(curve), curve["accuracy"]["all"]
    values = [accuracy["base"], *found.values(), accuracy["oracle"], accuracy["generated"]]
    header = ["base", *(f"{size} labels" for size in found), "all labels", "generated"]
    rows = worth_in_labels(accuracy)
    return [
        f"## What a generated adapter is worth: {counted(curve)}",
        "",
        *table_head(header),
        table_row([f"{value:.3f}" for value in values]),
        "",
        f"The generated adapter does as well as one trained on {rows} labelled rows.",
    ]


def counted(results: Mapping[str, Any]) -> str:
    count = len(results["datasets"])
    return f"{count} held-out task{'s' * (count != 1)}"


def table_head(names: Sequence[str]) -> list[str]:
    return [table_row(names), table_row(["---"] * len(names))]


def table_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def title(column: str) -> str:
    return column.replace("_", " ")


def signed(estimate: Mapping[str, float]) -> str:
    mean = f"{estimate['mean']:+.3f}"
    return f"{mean} {span(estimate['low'], estimate['high'])}" if "low" in estimate else mean


def span(low: float, high: float) -> str:
    return f"[{low:.3f}, {high:.3f}]"


def plot(document: Mapping[str, Any], file: Path) -> None:
    """Writes a picture of the mean exact matches and of the label curve."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    panels = [*document["protocols"], *(["curve"] if document["curve"] else [])]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 4), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        if panel == "curve":
            found, accuracy = label_curve(document["curve"]), document["curve"]["accuracy"]["all"]
            axis.plot(list(found), list(found.values()), "o-", color="tab:gray", label="trained")
            for name, color in (("generated", "tab:blue"), ("oracle", "black")):
                axis.axhline(accuracy[name], color=color, linestyle="--", label=name)
            axis.set(xscale="log", xlabel="labelled rows of the task", title="label curve")
            axis.legend()
            continue
        results = document["protocols"][panel]
        names = results["columns"]
        means = [results["accuracy"]["all"][name] for name in names]
        spans = [results["interval"]["all"][name] for name in names]
        errors = [[max(0.0, m - low) for m, (low, _) in zip(means, spans, strict=True)]]
        errors += [[max(0.0, high - m) for m, (_, high) in zip(means, spans, strict=True)]]
        colors = ["tab:blue" if name == "generated" else "tab:gray" for name in names]
        axis.barh([title(name) for name in names], means, xerr=errors, color=colors)
        axis.invert_yaxis()
        axis.set(xlim=(0, 1), xlabel="exact match", title=f"{panel}: {counted(results)}")
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    plt.close(figure)


def commit() -> str:
    """Returns the commit of the repository that this file is in, with + if files differ from it."""
    git = ["git", "-C", str(HERE)]
    try:
        found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    except OSError:
        return "unknown"
    return found.stdout.strip()[:12] + "+" * bool(changed.stdout.strip()) or "unknown"


def minutes(elapsed: float, left: float | None = None) -> str:
    text = f"{elapsed / 60:.1f} min"
    return text if left is None else f"{text}, about {left / 60:.1f} left"


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
