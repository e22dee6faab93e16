"""The report of runs: how they differ, their curves, checkpoints and evaluations, and where they
come from."""

import shlex
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loragen.core.config.yaml_file import inline
from loragen.core.contents import read_json
from loragen.core.errors import DataError, LoragenError, UsageError, counted, shortened
from loragen.core.evaluation.report import evaluation_blocks
from loragen.core.page import (
    MOST_POINTS,
    Block,
    Cell,
    Code,
    Details,
    Facts,
    Link,
    Note,
    Page,
    PageSection,
    Plot,
    Plots,
    Table,
    Text,
    figure,
    line,
)
from loragen.core.run import CHECKPOINTS, CONFIG
from loragen.core.run.history.comparison import (
    RECORDED,
    OpenedRun,
    changed_settings,
    chosen_metrics,
    differing_settings,
    last_and_lowest,
    run_labels,
)
from loragen.core.run.history.summary import duration_text, size_text

MOST_CHECKPOINTS = 8
"""The most checkpoints of a run that are read; `ckpt analyze` reads all."""
LONGEST_LABEL, LONGEST_CELL = 30, 28
RESULTS = "results.json"


@dataclass(frozen=True)
class Evaluation:
    """The results.json of a `gen eval`, or of a demo."""

    file: Path
    document: dict[str, Any]

    @property
    def generators(self) -> list[str]:
        """The files of the generators that were evaluated; one that is combined from several has
        those of all."""
        one = self.document.get("generator")
        return [str(file) for file in self.document.get("generators") or [one] if file]


@dataclass(frozen=True)
class RunsReport:
    """What a report is about, read from the disk."""

    runs: Sequence[OpenedRun]
    evaluations: Sequence[Evaluation] = ()
    metrics: Sequence[str] = ()
    """Those that are drawn openly; empty: the loss and what each run is chosen by."""
    analyzed: Sequence[Path] = field(default=())
    """The runs whose checkpoints are analysed."""

    def page(self, progress: Callable[[str, int, int], None] | None = None) -> Page:
        """Reads the checkpoints and returns the page. `progress` is that of `analyze_checkpoints`.

        Raises UsageError for a metric that none of the runs has logged.
        """
        names = [f"{a} {shortened(r.run.name, LONGEST_LABEL)}" for a, r in self._labelled()]
        one = self.runs[0].run
        title = f"Report of {counted(len(self.runs), 'run')}" if len(self.runs) > 1 else one.name
        sections = [PageSection("Runs", [self._overview()], "runs")]
        if len(self.runs) > 1:
            sections.append(PageSection("Differences", self._differences(), "differences"))
        sections.append(PageSection("Curves", self._curves(names), "curves"))
        if self.analyzed:
            sections += self._checkpoints(progress)
        for i, evaluation in enumerate(self.evaluations):
            heading = "Evaluation" if len(self.evaluations) == 1 else f"Evaluation {i + 1}"
            about = ", ".join(evaluation.generators) or "of a generator that it does not name"
            blocks: list[Block] = [Text(f"{evaluation.file}: {about}", soft=True)]
            blocks += evaluation_blocks(evaluation.document)
            sections.append(PageSection(heading, blocks, f"evaluation-{i + 1}"))
        for label, opened in self._labelled():
            heading = f"{label}: {opened.run.name}" if len(self.runs) > 1 else "Provenance"
            sections.append(PageSection(heading, _origins(opened), f"run-{label}"))
        lead = "Training runs of loragen: their settings, metrics, checkpoints and evaluations."
        return Page(title, lead, sections)

    def _labelled(self) -> list[tuple[str, OpenedRun]]:
        return list(zip(run_labels(len(self.runs)), self.runs, strict=True))

    def _overview(self) -> Table:
        header = ["run", "state", "command", "dataset", "base", "steps", "best", "metric"]
        rows: list[list[Cell]] = []
        for label, opened in self._labelled():
            run = opened.run
            datasets = run.datasets[0] if len(run.datasets) == 1 else None
            rows.append(
                [
                    Link(f"{label} {run.name}", f"run-{label}"),
                    run.state,
                    run.command or None,
                    datasets or (f"{len(run.datasets)} datasets" if run.datasets else None),
                    Path(run.base_model).name or None,
                    f"{run.step}/{run.max_steps}" if run.max_steps else str(run.step),
                    run.best,
                    run.metric or None,
                    None if run.seconds is None else duration_text(run.seconds),
                    run.started.replace("T", " ").removesuffix("+00:00") or None,
                ]
            )
        return Table([*header, "took", "started (UTC)"], rows)

    def _differences(self) -> list[Block]:
        """Returns a table for the runs of each command, whose settings are others."""
        tables: list[Block] = []
        for kind in dict.fromkeys(opened.run.kind for opened in self.runs):
            of_kind = [(label, one) for label, one in self._labelled() if one.run.kind == kind]
            if len(of_kind) < 2 or not kind:  # of a manifest that cannot be read
                continue
            found = differing_settings([one for _, one in of_kind])
            rows = [[k, *(_value(v, LONGEST_CELL) for v in of)] for k, of in found.items()]
            if rows:
                tables.append(Table(["setting", *(label for label, _ in of_kind)], rows))
        return tables or [Text("No setting differs between runs of the same command.")]

    def _curves(self, names: Sequence[str]) -> list[Block]:
        chosen = chosen_metrics(self.runs, self.metrics)
        others = dict.fromkeys(
            name for run in self.runs for name in run.curves if name not in chosen
        )
        blocks: list[Block] = []
        for shown, title in ((chosen, ""), (list(others), "All other metrics")):
            plots = [plot for name in shown if (plot := self._curve(name, names))]
            rows: list[list[Cell]] = []
            for name in shown:
                for label, run in self._labelled():
                    if ends := last_and_lowest(run, name):
                        of = f"{name}, {label}" if len(self.runs) > 1 else name
                        rows.append([of, *ends])
            table = Table(["metric", "last", "lowest", "at step"], rows)
            found: list[Block] = [*([Plots(plots)] if plots else []), *([table] if rows else [])]
            blocks += [Details(title, found)] if title and found else found
        return blocks or [Text("Nothing was logged.")]

    def _curve(self, metric: str, names: Sequence[str]) -> Plot | None:
        """Returns the curves of all runs that have two points at least."""
        lines, longest, lowest = [], 0, 1.0
        for i, (name, run) in enumerate(zip(names, self.runs, strict=True)):
            steps, values = run.curves.get(metric, ([], []))
            if len(values) > 1:
                lines.append(line(i, name, steps, values))
                longest, lowest = max(longest, len(values)), min(lowest, *values)
        if not lines:
            return None
        caption = "Drag to zoom, tap a name to hide it."
        if longest > MOST_POINTS:
            caption = f"Of {longest:,} points, the extremes of each part are drawn. {caption}"
        hover = "x unified" if len(lines) <= 8 else "closest"
        drawn = figure(lines, "optimizer step", hovermode=hover)
        return Plot(metric, drawn, caption, 300, log=lowest > 0)

    def _checkpoints(self, progress: Callable[[str, int, int], None] | None) -> list[PageSection]:
        from loragen.core.analysis.page import MEANING, analysis_sections
        from loragen.core.analysis.series import analyze_checkpoints

        about = f"{MEANING} At most {MOST_CHECKPOINTS} checkpoints of each run, evenly spaced."
        try:
            analysis = analyze_checkpoints(self.analyzed, progress, MOST_CHECKPOINTS)
        except LoragenError as error:
            failed = Note("The checkpoints could not be analysed", [str(error)])
            return [PageSection("Checkpoints", [failed], "checkpoints")]
        first, *others = analysis_sections(analysis, level=3)
        blocks = [Text(about, soft=True), *first.blocks]
        return [PageSection("Checkpoints", blocks, "checkpoints"), *others]


def with_checkpoints(runs: Sequence[OpenedRun]) -> list[Path]:
    """Returns the directories of the runs that hold checkpoints of an adapter."""
    return [
        opened.run.path
        for opened in runs
        if opened.run.kind == "lora" and any((opened.run.path / CHECKPOINTS).glob("*.ckpt"))
    ]


def find_evaluations(runs: Sequence[OpenedRun], given: Sequence[Path]) -> list[Evaluation]:
    """Returns the evaluations at the paths that are given, files or directories, and those beside a
    generator's run that name it.

    Raises UsageError for a path without results, DataError for a file with none.
    """
    found: dict[Path, Evaluation] = {}
    for path in given:
        file = path / RESULTS if path.is_dir() else path
        if not file.is_file():
            raise UsageError(f"--evaluation: {file}: no such file; `gen eval --output` writes one")
        found[file.resolve()] = _evaluation(file)
    for opened in runs:
        if opened.run.kind != "generator":
            continue
        home = opened.run.path.resolve()
        above = [home.parent, home.parent.parent]
        beside = [home / RESULTS, *home.glob(f"*/{RESULTS}")]
        for folder in above:
            beside += [folder / RESULTS, *sorted(folder.glob(f"*/{RESULTS}"))]
        for file in beside:
            if not file.is_file() or file.resolve() in found:
                continue
            with suppress(LoragenError):  # somebody else's file of that name
                one = _evaluation(file)
                if any(home in Path(of).resolve().parents for of in one.generators):
                    found[file.resolve()] = one
    return list(found.values())


def _evaluation(file: Path) -> Evaluation:
    document = read_json(file)
    if not {"accuracy", "columns", "interval", "options", "datasets"} <= {*document}:
        raise DataError(f"{file}: not the results of `gen eval`")
    return Evaluation(file, dict(document))


# ---------------------------------------------------------------------------- one run


def _origins(opened: OpenedRun) -> list[Block]:
    """Returns where a run comes from: its data, base, environment, settings and command."""
    run = opened.run
    try:
        manifest = opened.manifest
    except LoragenError as error:
        return [Note("The manifest cannot be read", [str(error)])]
    facts: dict[str, Cell] = {
        "state": run.state,
        "steps": f"{run.step}/{run.max_steps}" if run.max_steps else run.step,
        f"best {run.metric or 'metric'}": run.best,
        "took": None if run.seconds is None else duration_text(run.seconds),
        "size on disk": size_text(run.size),
    }
    dataset = manifest.get("dataset") or {}
    read: dict[str, object] = {
        "directory": run.path.absolute(),
        "started (UTC)": run.started,
        "written by": run.writer,
        "base": run.base_model,
        "base, sha256": manifest.get("base_fingerprint"),
        "base, computed in": manifest.get("base_dtype"),
        "dataset": dataset.get("path") or dataset.get("name"),
        "dataset, sha256": dataset.get("sha256"),
        "dataset, rows": dataset.get("rows"),
        "chat template's date": manifest.get("chat_date"),
        "encoder, sha256": manifest.get("encoder_fingerprint"),
        "resumed at step": ", ".join(map(str, manifest.get("resumed_from") or [])),
        "converted from": manifest.get("converted_from"),
        "logged to": ", ".join(map(" ".join, (manifest.get("logger_run_ids") or {}).items())),
        "problem": run.problem,
    }
    blocks: list[Block] = [Facts(facts)]
    if run.command and (run.path / CONFIG).is_file() and not manifest.get("converted_from"):
        config = shlex.quote(str(run.path.absolute() / CONFIG))
        blocks += [
            Text("To train it again, in a new directory:"),
            Code(f"loragen {run.command} --config {config}"),
        ]
    blocks.append(Table(["", ""], [[k, str(v)] for k, v in read.items() if v]))
    if sources := manifest.get("source_records"):
        rows = [
            [
                one.get("name"),
                "validation" if one.get("held_out") else "training",
                one.get("count"),
                one.get("place"),
                one.get("prompts_from"),
                str(one.get("checkpoints"))[:12],
            ]
            for one in sources
        ]
        header = ["source", "for", "checkpoints", "of", "prompts of", "hash"]
        blocks.append(Details(f"{counted(len(rows), 'source')}", [Table(header, rows)]))
    environment = {
        **(manifest.get("environment") or {}),
        **{k: v for k, v in opened.settings.items() if k.startswith("version of ")},
    }
    peft = (manifest.get("adapter_config") or {}).get("peft_version")
    if peft:
        environment.setdefault("peft", peft)
    if environment:
        blocks.append(Table(["", ""], [*map(list, environment.items())], "Environment"))
    if changed := changed_settings(opened):
        rows = [[key, _value(value)] for key, value in changed.items()]
        blocks.append(Table(["", ""], rows, "Settings that are not the defaults"))
    every = [
        [key, _value(value)]
        for key, value in opened.settings.items()
        if key not in RECORDED and not key.startswith("version of ")
    ]
    if every:
        blocks.append(Details("All settings", [Table(["", ""], every)]))
    return blocks


def _value(value: object, longest: int = 200) -> str | None:
    return None if value is None else shortened(inline(value), longest)
