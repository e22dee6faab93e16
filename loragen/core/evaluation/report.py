"""The results of an evaluation as tables, remarks, Markdown, a page and a picture. Light."""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import pairwise
from math import exp, log
from pathlib import Path
from typing import Any, NamedTuple

from loragen.core.errors import listing, pip_install, shortened
from loragen.core.evaluation.contestants import GENERATED, LABEL_CURVE, MEASURES, ORACLE, titles
from loragen.core.files import write_json, write_text, written_atomically
from loragen.core.outputs import Record, recorded_in_text, with_record, written_directory
from loragen.core.page import COLOURS as PALETTE
from loragen.core.page import (
    Block,
    Cell,
    Page,
    PageSection,
    Plot,
    Plots,
    Table,
    cell_text,
    figure,
    has_library,
    plain,
)

logger = logging.getLogger(__name__)

RESULTS = "results.md"
METHOD = "Accuracies are exact matches, losses nats a token; the bars have 95 % intervals."
COLOUR, COLOURS = "#8d99ae", {GENERATED: "#d1495b", ORACLE: "#2b2d42"}
PAGE_COLOURS = {GENERATED: PALETTE[4], ORACLE: PALETTE[2]}
"""Colours that stand out on white and on black."""
PANELS_A_ROW, MOST_PANELS = 3, 12
LONGEST_NAME, LONGEST_TITLE = 36, 80
KEYS = (*MEASURES, "interval", "differences", "beats", "beaten_by", "margins", "headroom")


class TableRow(NamedTuple):
    """A row of the tables: a dataset, or the average over a group."""

    name: str
    values: Mapping[str, Any]
    """{key of `statistics.summary`: value}"""


def table_rows(document: Mapping[str, Any]) -> list[TableRow]:
    """Returns one row per group; if there is one group, its datasets and their average."""
    averages = [
        TableRow(name.replace("_", " "), values) for name, values in _averages(document).items()
    ]
    if len(averages) > 1:
        return averages
    datasets = [TableRow(one["name"], one) for one in document["datasets"]]
    if len(datasets) == 1:
        return datasets
    return [*datasets, TableRow(f"mean of {len(datasets)}", averages[0].values)]


def _averages(document: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns {group: {key: value}}."""
    return {
        group: {key: document[key][group] for key in KEYS if group in document.get(key, {})}
        for group in document["accuracy"]
    }


def tables(document: Mapping[str, Any]) -> Iterator[Table]:
    """Yields a table for each measure that some row has, of the differences from the generated
    adapter, of the recovered headroom, of the label curve, and of times to obtain an adapter."""
    above = titles(document["options"]["shots"])
    names = [name for name in document["columns"] if name not in LABEL_CURVE]
    header = [above.get(name, name) for name in names]
    rows = table_rows(document)
    for measure, title in MEASURES.items():
        found = []
        for row in rows:
            if measure in row.values:
                cells = [f"{row.values[measure][name]:.2f}" for name in names]
                if measure == "accuracy" and GENERATED in names:
                    low, high = row.values["interval"][GENERATED]
                    cells[names.index(GENERATED)] += f" [{low:.2f}, {high:.2f}]"
                found.append([row.name, *cells])
        if found:
            yield Table([title, *header], found)
    averages = rows if len(rows) == 1 or len(_averages(document)) > 1 else rows[-1:]
    if others := [name for name in names if name != GENERATED and GENERATED in names]:
        yield Table(
            ["generated minus", *(above.get(name, name) for name in others)],
            [[row.name, *_differences(row, others)] for row in averages],
        )
    if kept := [row for row in averages if row.values.get("headroom", {}).get("datasets")]:
        yield Table(
            ["recovered headroom", *header],
            [
                [f"{row.name} ({of['datasets']} of {of['of']})"]
                + [f"{of['columns'][name]['mean']:.2f}" for name in names]
                for row in kept
                for of in [row.values["headroom"]]
            ],
        )
    if sizes := {LABEL_CURVE[name]: name for name in document["columns"] if name in LABEL_CURVE}:
        yield Table(
            ["LoRA trained on", *(f"{size} labels" for size in sizes)],
            [
                [row.name, *(f"{row.values['accuracy'][name]:.2f}" for name in sizes.values())]
                for row in rows
            ],
        )
    obtain = document["seconds"]["obtain"]
    seconds = ["-" if obtain[name] is None else f"{obtain[name]:.3g}" for name in names]
    yield Table(["seconds to obtain", *header], [["an adapter", *seconds]])


def _differences(row: TableRow, others: Sequence[str]) -> list[str]:
    found = [row.values["differences"][name] for name in others]
    return [f"{one['mean']:+.2f} [{one['low']:+.2f}, {one['high']:+.2f}]" for one in found]


def worth_in_labels(accuracies: Mapping[str, float]) -> str:
    """Returns in words the number of labelled rows at which the label curve first reaches the
    accuracy of the generated adapter, interpolated between logarithms: `fewer than 5`, `about 12`
    or `more than 300`. There has to be a label curve."""
    curve = [(LABEL_CURVE[name], accuracies[name]) for name in LABEL_CURVE if name in accuracies]
    reached = accuracies[GENERATED]
    if curve[0][1] > reached:
        return f"fewer than {curve[0][0]}"
    if curve[0][1] == reached:
        return f"about {curve[0][0]}"
    for (fewer, below), (more, above) in pairwise(curve):
        if above >= reached:
            share = (reached - below) / (above - below)
            return f"about {exp(log(fewer) + share * (log(more) - log(fewer))):.0f}"
    return f"more than {curve[-1][0]}"


def remarks(document: Mapping[str, Any]) -> list[str]:
    """Returns lines about the significant differences, the controls, the worth of the generated
    adapter, the costs, the novelty and the method."""
    above = titles(document["options"]["shots"])
    rows = table_rows(document)
    found = [_claims(row, above) for row in rows if "beats" in row.values]
    averages = rows if len(rows) == 1 or len(_averages(document)) > 1 else rows[-1:]
    for row in averages:
        for name, one in row.values.get("margins", {}).items():
            interval = f" [{one['low']:.3f}, {one['high']:.3f}]" if "low" in one else ""
            found.append(
                f"{row.name}: control {above[name]}: its loss is {one['mean']:.3f} nats{interval} "
                f"above that of the right prompts, and above it on {one['positive']:.0%} of the "
                "datasets"
            )
        if GENERATED in row.values.get("headroom", {}).get("columns", {}):
            of = row.values["headroom"]
            one = of["columns"][GENERATED]
            found.append(
                f"{row.name}: where the oracle leads the base by 0.15 or more ({of['datasets']} of "
                f"{of['of']} datasets), generated recovers {one['mean']:.2f} of the lead (median "
                f"{one['median']:.2f}; above 0 on {one['positive']:.0%})"
            )
        accuracies = row.values["accuracy"]
        if GENERATED in accuracies and any(name in accuracies for name in LABEL_CURVE):
            worth = worth_in_labels(accuracies)
            found.append(
                f"{row.name}: a generated adapter does as well as one trained on {worth} labelled "
                "rows"
            )
    found += _costs(document)
    if novelty := document["novelty"]:
        yard = novelty["collected"]
        several = len(novelty["groups"]) > 1

        def yardstick(kind: str) -> str:
            return f" (of a collected one, of the others': {yard[kind]:.2f})" if yard else ""

        found += [
            f"novelty{' of ' + group.replace('_', ' ') if several else ''}: outside of the span of "
            f"the collected adapters is {of['delta_w']:.2f} of the norm of the generated ΔW"
            f"{yardstick('delta_w')}, and {of['factors']:.2f} of that of its factors A and B"
            f"{yardstick('factors')}"
            for group, of in novelty["groups"].items()
        ]
    if GENERATED in document["columns"]:
        datasets, options = document["datasets"], document["options"]
        origins = " or ".join(dict.fromkeys(f"its {one['prompts_from']}" for one in datasets))
        counts = sorted({one["prompts"] for one in datasets})
        prompts = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
        found.append(
            f"generated: the mean of {options['draws']} adapters per dataset, each from {prompts} "
            f"unlabelled prompts of {origins}; [95 % interval] of a paired bootstrap over "
            "datasets, rows and draws"
        )
    return found


def _claims(row: TableRow, above: Mapping[str, str]) -> str:
    """Returns a line that names the columns that differ significantly from the generated one."""
    others = [name for name in row.values["differences"] if name not in LABEL_CURVE]
    beats, beaten = row.values["beats"], row.values["beaten_by"]
    kinds = {
        "beats": [name for name in others if name in beats],
        "is beaten by": [name for name in others if name in beaten],
        "shows no significant difference from": [
            name for name in others if name not in (*beats, *beaten)
        ],
    }
    parts = [
        f"{verb} {', '.join(above.get(name, name) for name in of)}"
        for verb, of in kinds.items()
        if of
    ]
    return f"{row.name}: generated {'; '.join(parts) or 'is the only column'}"


def _costs(document: Mapping[str, Any]) -> Iterator[str]:
    seconds, joint = document["seconds"], document["multi_task"]
    if seconds["ratio"]:
        how = f" ({seconds['trained']})" if "trained" in seconds else ""
        yield (
            f"cost: {seconds['train_adapter']:.3g} s to train an adapter{how}, "
            f"{seconds['generate_adapter']:.3g} s to generate one: {seconds['ratio']:.0f} to 1"
        )
    for one in joint if isinstance(joint, list) else [joint] if joint else []:
        if one.get("trainings"):
            of_generator = one.get("generator_seconds")
            beside = f"; the generator's took {of_generator:.0f} s" if of_generator else ""
            yield (
                f"multi-task: rank {one['rank']}, learning rate {one['learning_rate']:g}, chosen "
                f"on validation rows among {one['trainings']} trainings of {one['seconds']:.0f} s "
                f"in all{beside}"
            )


def markdown(document: Mapping[str, Any], title: str) -> str:
    """Returns the tables and remarks as a Markdown document."""

    def escaped(cell: Cell) -> str:
        return " ".join(cell_text(cell).split()).replace("|", "\\|")

    parts = [f"# {title}\n"]
    for table in tables(document):
        lines = [table.header, ["---"] * len(table.header), *table.rows]
        parts.append("".join(f"| {' | '.join(map(escaped, line))} |\n" for line in lines))
    parts.append("".join(f"- {escaped(remark)}\n" for remark in remarks(document)))
    return "\n".join(parts)


def evaluation_page(document: Mapping[str, Any], title: str) -> Page:
    """Returns the page that `gen eval --output` writes."""
    return Page(title, METHOD, [PageSection("", evaluation_blocks(document))])


def evaluation_blocks(document: Mapping[str, Any]) -> list[Block]:
    """Returns the exact match of every column in a plot for each row of the tables, of more than
    `MOST_PANELS` rows only of the average, and all tables and remarks."""
    above = titles(document["options"]["shots"])
    rows = table_rows(document)
    rows = rows if len(rows) <= MOST_PANELS else rows[-1:]
    height = 60 + 24 * len(document["columns"])
    panels = [Plot(row.name, _bars(row, above), "", height) for row in rows]
    notes = Table(["", ""], [_split(remark) for remark in remarks(document)])
    return [Plots(panels), *tables(document), notes]


def _bars(row: TableRow, above: Mapping[str, str]) -> str:
    from plotly.graph_objects import Bar

    accuracy, intervals = row.values["accuracy"], row.values["interval"]
    names = [plain(shortened(above.get(name, name), LONGEST_NAME)) for name in accuracy]
    bounds = [intervals[name] for name in accuracy]
    values = list(accuracy.values())
    bars = Bar(
        x=values,
        y=names,
        orientation="h",
        marker_color=[PAGE_COLOURS.get(name, COLOUR) for name in accuracy],
        error_x={
            "array": [max(high - v, 0) for v, (_, high) in zip(values, bounds, strict=True)],
            "arrayminus": [max(v - low, 0) for v, (low, _) in zip(values, bounds, strict=True)],
            "color": "#808890",
            "thickness": 1.5,
            "width": 4,
        },
        customdata=[list(one) for one in bounds],
        hovertemplate="%{y}: %{x:.2f} [%{customdata[0]:.2f}, %{customdata[1]:.2f}]<extra></extra>",
    )
    return figure(
        [bars], "exact match", xaxis_range=[0, 1.03], yaxis_autorange="reversed", bargap=0.35
    )


def _split(remark: str) -> tuple[str, str]:
    """Returns what a remark is about, and what it says."""
    about, _, said = remark.partition(": ")
    return about, said


def write_results(document: Mapping[str, Any], title: str, directory: Path) -> None:
    """Writes results.json, results.png and results.html (a warning replaces each whose library is
    missing) and results.md, whose last lines record the others, in place of earlier ones."""
    with written_directory(directory, results_record) as temporary:
        write_json(temporary / "results.json", document)
        picture = directory / "results.png"
        if find_spec("matplotlib"):
            draw_accuracies(document, title, temporary / picture.name)
        else:
            logger.warning("%s: left out without matplotlib; %s", picture, pip_install("plots"))
        page = directory / "results.html"
        if has_library():
            evaluation_page(document, title).write(temporary / page.name)
        else:
            logger.warning("%s: left out without plotly; %s", page, pip_install("plots"))
        write_text(temporary / RESULTS, with_record(markdown(document, title), temporary))


def results_record(directory: Path) -> Record | None:
    """Returns the record of the results that a directory holds."""
    return recorded_in_text(directory, RESULTS)


def draw_accuracies(document: Mapping[str, Any], title: str, file: Path) -> None:
    """Draws the exact match of every column with its 95 % interval, in a panel per row of the
    table; of more than `MOST_PANELS` rows, only the average is drawn."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = table_rows(document)
    rows = rows if len(rows) <= MOST_PANELS else rows[-1:]
    across = min(len(rows), PANELS_A_ROW)
    down = -(-len(rows) // across)
    height = 0.9 + (0.7 + 0.38 * len(document["columns"])) * down
    above = titles(document["options"]["shots"])
    title = shortened(title, LONGEST_TITLE)
    labels = [title, *(row.name for row in rows), *above.values(), *document["columns"]]
    # A `$` in a name is a dollar. What no font can draw has been said in one line.
    style: Any = {"font.family": _families("".join(labels), file), "text.parse_math": False}
    with mpl.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure, axes = plt.subplots(
            down,
            across,
            figsize=(max(4.2 * across, 7), height),
            sharey=True,
            layout="constrained",
            squeeze=False,
        )
        for axis, row in zip(axes.flat, rows, strict=False):
            _draw_panel(axis, row, above)
        for axis in axes.flat[len(rows) :]:
            axis.set_visible(False)
        axes.flat[0].invert_yaxis()  # the axes share it
        figure.suptitle(title)
        figure.supxlabel("exact match")
        with written_atomically(file) as temporary:
            figure.savefig(temporary, dpi=120, format="png")
        plt.close(figure)


def _families(text: str, file: Path) -> list[str]:
    """Returns matplotlib's default font and, for characters that it lacks (Chinese), installed
    fonts that have them. Warns once of those that no installed font has."""
    from matplotlib import font_manager, rcParams

    def characters(path: str) -> set[int]:
        return {*font_manager.get_font(path).get_charmap()}

    families = list(rcParams["font.family"])
    missing = {ord(char) for char in text if char.isprintable()}
    missing -= characters(font_manager.findfont(font_manager.FontProperties()))
    plain = {
        entry.name: entry.fname
        for entry in font_manager.fontManager.ttflist
        if entry.style == "normal"
        and str(entry.weight) in ("400", "normal", "regular")
        and not entry.name.startswith("Last Resort")  # which draws every character as a box
    }
    for name, path in plain.items() if missing else ():
        try:
            found = missing & characters(path)
        except (OSError, RuntimeError):  # a font that FreeType does not read
            continue
        if found:
            families.append(name)
            missing -= found
        if not missing:
            break
    if missing:
        logger.warning(
            "%s: no installed font has %s (Noto Sans CJK has Chinese, Japanese and Korean); "
            "results.md has these names in full",
            file.name,
            listing([chr(code) for code in sorted(missing)], 6),
        )
    return families


def _draw_panel(axis: Any, row: TableRow, above: Mapping[str, str]) -> None:
    accuracy, intervals = row.values["accuracy"], row.values["interval"]
    for position, (name, value) in enumerate(accuracy.items()):
        low, high = intervals[name]
        bar = [[max(value - low, 0)], [max(high - value, 0)]]
        axis.barh(position, value, color=COLOURS.get(name, COLOUR), xerr=bar, capsize=3)
        axis.text(1.2, position, f"{value:.2f}", va="center", ha="right", fontsize=9)
    axis.set(title=shortened(row.name, LONGEST_NAME), xlim=(0, 1.22), xticks=[0, 0.5, 1])
    axis.set_yticks(range(len(accuracy)), [above.get(name, name) for name in accuracy])
    axis.spines[["top", "right"]].set_visible(False)
