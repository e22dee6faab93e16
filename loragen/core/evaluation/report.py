"""The results of an evaluation as tables, remarks, Markdown and a picture. Light."""

import logging
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from loragen.core.evaluation.contestants import GENERATED, ORACLE, titles
from loragen.core.files import write_json, write_text, written_atomically

log = logging.getLogger(__name__)


class Measure(NamedTuple):
    name: str
    """The key in the results."""
    title: str
    """The header of its table."""
    field: str
    """The field of `Scores`."""


MEASURES = (
    Measure("accuracy", "exact match", "exact_match"),
    Measure("choice_accuracy", "choice accuracy", "choice_accuracy"),
    Measure("format_validity", "format validity", "format_validity"),
)


class TableRow(NamedTuple):
    """A row of the tables: a dataset, or the average over a group."""

    name: str
    values: Mapping[str, Any]
    """{measure: {column: value}}, the interval and the significant differences."""


class Table(NamedTuple):
    header: list[str]
    rows: list[list[str]]


def table_rows(document: Mapping[str, Any]) -> list[TableRow]:
    """Returns one row per group; if there is one group, its datasets and their average."""
    keys = (*(measure.name for measure in MEASURES), "interval", "beats", "beaten_by")
    averages = {
        group: {key: document[key][group] for key in keys if group in document.get(key, {})}
        for group in document["accuracy"]
    }
    if len(averages) > 1:
        return [TableRow(group.replace("_", " "), of) for group, of in averages.items()]
    datasets = [TableRow(one["name"], one) for one in document["datasets"]]
    if len(datasets) == 1:
        return datasets
    return [*datasets, TableRow(f"mean of {len(datasets)}", *averages.values())]


def tables(document: Mapping[str, Any]) -> Iterator[Table]:
    """Yields a table for each measure that some row has, and one of times to obtain an adapter."""
    names, above = document["columns"], titles(document["options"]["shots"])
    header = [above[name] for name in names]
    for measure in MEASURES:
        rows = []
        for row in table_rows(document):
            if measure.name in row.values:
                cells = [f"{row.values[measure.name][name]:.2f}" for name in names]
                if measure.name == "accuracy":
                    for name, (low, high) in row.values.get("interval", {}).items():
                        cells[names.index(name)] += f" [{low:.2f}, {high:.2f}]"
                rows.append([row.name, *cells])
        if rows:
            yield Table([measure.title, *header], rows)
    obtain = document["seconds"]["obtain"]
    seconds = ["-" if obtain[name] is None else f"{obtain[name]:.3g}" for name in names]
    yield Table(["seconds to obtain", *header], [["an adapter", *seconds]])


def remarks(document: Mapping[str, Any]) -> list[str]:
    """Returns lines about the significant differences, the costs, the novelty and the method."""
    above = titles(document["options"]["shots"])
    found = [_differences(row, above) for row in table_rows(document) if "beats" in row.values]
    seconds, novelty = document["seconds"], document["novelty"]
    if seconds["ratio"]:
        how = f" ({seconds['trained']})" if "trained" in seconds else ""
        found.append(
            f"cost: {seconds['train_adapter']:.3g} s to train an adapter{how}, "
            f"{seconds['generate_adapter']:.3g} s to generate one: {seconds['ratio']:.0f} to 1"
        )
    if novelty:
        within, few = novelty["within_a_dataset"], novelty.get("checkpoints_of_each")
        sample = f" (of {few} of each dataset's, evenly spaced)" if few else ""
        several = len(novelty["groups"]) > 1
        found += [
            f"novelty{' of ' + group.replace('_', ' ') if several else ''}: the generated ΔW is "
            f"{of['to_nearest']:.3g} from the nearest training checkpoint{sample} and "
            f"{of['to_mean']:.3g} from the mean adapter; the checkpoints of a training dataset are "
            f"{within:.3g} from their mean"
            for group, of in novelty["groups"].items()
        ]
    if GENERATED in document["columns"]:
        datasets, draws = document["datasets"], document["options"]["draws"]
        origins = " or ".join(dict.fromkeys(f"its {one['prompts_from']}" for one in datasets))
        counts = sorted({one["prompts"] for one in datasets})
        prompts = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
        found.append(
            f"generated: the mean of {draws} adapters per dataset, each from {prompts} unlabelled "
            f"prompts of {origins}; [95 % interval]; the values of the other columns have no "
            "interval and are compared as they are"
        )
    return found


def _differences(row: TableRow, above: Mapping[str, str]) -> str:
    """Returns a line that names the columns below, above and inside the generated interval."""
    others = [name for name in row.values["accuracy"] if name != GENERATED]
    beats, beaten = row.values["beats"], row.values["beaten_by"]
    inside = [name for name in others if name not in (*beats, *beaten)]
    kinds = {
        "beats": beats,
        "is beaten by": beaten,
        "shows no significant difference from": inside,
    }
    parts = [f"{verb} {', '.join(above[name] for name in of)}" for verb, of in kinds.items() if of]
    return f"{row.name}: generated {'; '.join(parts) or 'is the only column'}"


def markdown(document: Mapping[str, Any], title: str) -> str:
    """Returns the tables and remarks as a Markdown document."""

    def escaped(text: str) -> str:
        return text.replace("|", "\\|")

    parts = [f"# {title}\n"]
    for table in tables(document):
        lines = [table.header, ["---"] * len(table.header), *table.rows]
        parts.append("".join(f"| {' | '.join(map(escaped, line))} |\n" for line in lines))
    parts.append("".join(f"- {escaped(remark)}\n" for remark in remarks(document)))
    return "\n".join(parts)


def write_results(document: Mapping[str, Any], title: str, directory: Path) -> None:
    """Writes results.png (a warning replaces it if matplotlib is missing), results.md and
    results.json, each atomically."""
    picture = directory / "results.png"
    if find_spec("matplotlib"):
        draw_accuracies(document, title, picture)
    else:
        log.warning("%s: left out without matplotlib; pip install 'loragen[plots]'", picture)
    write_text(directory / "results.md", markdown(document, title))
    write_json(directory / "results.json", document)


COLOUR, COLOURS = "#8d99ae", {GENERATED: "#d1495b", ORACLE: "#2b2d42"}
PANELS_A_ROW, MOST_PANELS = 3, 12


def draw_accuracies(document: Mapping[str, Any], title: str, file: Path) -> None:
    """Draws the exact match of every column and the 95 % interval of generated adapters, in a panel
    per row of the table; of more than `MOST_PANELS` rows, only the average is drawn."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = table_rows(document)
    rows = rows if len(rows) <= MOST_PANELS else rows[-1:]
    across = min(len(rows), PANELS_A_ROW)
    down = -(-len(rows) // across)
    height = 0.9 + (0.7 + 0.38 * len(document["columns"])) * down
    figure, axes = plt.subplots(
        down,
        across,
        figsize=(max(4.2 * across, 7), height),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for axis, row in zip(axes.flat, rows, strict=False):
        _draw_panel(axis, row, titles(document["options"]["shots"]))
    for axis in axes.flat[len(rows) :]:
        axis.set_visible(False)
    axes.flat[0].invert_yaxis()  # the axes share it
    figure.suptitle(title)
    figure.supxlabel("exact match")
    with written_atomically(file) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)


def _draw_panel(axis: Any, row: TableRow, above: Mapping[str, str]) -> None:
    accuracy, intervals = row.values["accuracy"], row.values.get("interval", {})
    for position, (name, value) in enumerate(accuracy.items()):
        low, high = intervals.get(name, (value, value))
        bar = [[value - low], [high - value]] if name in intervals else None
        axis.barh(position, value, color=COLOURS.get(name, COLOUR), xerr=bar, capsize=3)
        axis.text(max(value, high) + 0.03, position, f"{value:.2f}", va="center", fontsize=9)
    axis.set(title=row.name, xlim=(0, 1.18), xticks=[0, 0.5, 1])
    axis.set_yticks(range(len(accuracy)), [above[name] for name in accuracy])
    axis.spines[["top", "right"]].set_visible(False)
