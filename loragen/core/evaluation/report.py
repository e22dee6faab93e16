"""What a table is made of: the measures, by every name they go by. Light.

The results in words and tables, for a terminal, Markdown and a picture. Light.

The table as one picture.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from loragen.core.evaluation.contestants import GENERATED, ORACLE, titles
from loragen.core.files import write_json, write_text, written_atomically


class Measure(NamedTuple):
    name: str
    """In the results."""
    title: str
    """Above its table."""
    field: str
    """Of `Scores`."""


MEASURES = (
    Measure("accuracy", "exact match", "exact_match"),
    Measure("choice_accuracy", "choice accuracy", "choice_accuracy"),
    Measure("format_validity", "format validity", "format_validity"),
)


class Line(NamedTuple):
    """A row of the tables: a dataset, or the average over a group."""

    name: str
    told: Mapping[str, Any]
    """Measure -> column -> value, and the claims."""


class Table(NamedTuple):
    header: list[str]
    rows: list[list[str]]


def lines(document: Mapping[str, Any]) -> list[Line]:
    """The groups, where there are several; else the datasets and their average."""
    keys = (*(measure.name for measure in MEASURES), "interval", "beats", "beaten_by")
    groups = list(document["accuracy"])
    averages = {
        group: {key: document[key][group] for key in keys if group in document.get(key, {})}
        for group in groups
    }
    if len(groups) > 1:
        return [Line(group.replace("_", " "), told) for group, told in averages.items()]
    datasets = [Line(one["name"], one) for one in document["datasets"]]
    if len(datasets) == 1:
        return datasets
    return [*datasets, Line(f"mean of {len(datasets)}", averages[groups[0]])]


def tables(document: Mapping[str, Any]) -> Iterator[Table]:
    """A table for each measure that some line has, and one of what the adapters cost."""
    names, above = document["columns"], titles(document["options"]["shots"])
    header = [above[name] for name in names]
    for measure in MEASURES:
        with_it = [line for line in lines(document) if measure.name in line.told]
        if with_it:
            rows = [[line.name, *_cells(line, measure.name, names)] for line in with_it]
            yield Table([measure.title, *header], rows)
    obtain = document["seconds"]["obtain"]
    seconds = ["-" if obtain[name] is None else f"{obtain[name]:.3g}" for name in names]
    yield Table(["seconds to obtain", *header], [["an adapter", *seconds]])


def remarks(document: Mapping[str, Any]) -> list[str]:
    """What may be claimed, and how it was measured, a sentence each."""
    above = titles(document["options"]["shots"])
    said = [_claim(line, above) for line in lines(document) if "beats" in line.told]
    seconds, novelty = document["seconds"], document["novelty"]
    if seconds["ratio"]:
        how = f" ({seconds['trained']})" if "trained" in seconds else ""
        said.append(
            f"cost: {seconds['train_adapter']:.3g} s to train an adapter{how}, "
            f"{seconds['generate_adapter']:.3g} s to generate one: {seconds['ratio']:.0f} to 1"
        )
    if novelty:
        within, few = novelty["within_a_dataset"], novelty.get("checkpoints_of_each")
        looked = f" (of {few} of each dataset's, evenly spaced)" if few else ""
        said += [
            f"novelty{_of(group, novelty['groups'])}: the generated ΔW is {of['to_nearest']:.3g} "
            f"from the nearest training checkpoint{looked} and {of['to_mean']:.3g} from the "
            f"mean adapter; checkpoints of one dataset are {within:.3g} from their mean"
            for group, of in novelty["groups"].items()
        ]
    if GENERATED in document["columns"]:
        said.append(_drawn(document))
    return said


def markdown(document: Mapping[str, Any], title: str) -> str:
    """The same as a document."""
    parts = [f"# {title}\n"]
    for table in tables(document):
        cells = [table.header, ["---"] * len(table.header), *table.rows]
        parts.append("".join(f"| {' | '.join(map(_escaped, row))} |\n" for row in cells))
    parts.append("".join(f"- {_escaped(sentence)}\n" for sentence in remarks(document)))
    return "\n".join(parts)


def write(document: Mapping[str, Any], title: str, directory: Path) -> None:
    """results.json, results.md and results.png; each appears whole or not at all."""

    draw(document, title, directory / "results.png")
    write_text(directory / "results.md", markdown(document, title))
    write_json(directory / "results.json", document)


def _cells(line: Line, measure: str, names: Sequence[str]) -> Iterator[str]:
    for name in names:
        text = f"{line.told[measure][name]:.2f}"
        interval = line.told.get("interval", {}).get(name) if measure == "accuracy" else None
        yield f"{text} [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else text


def _claim(line: Line, above: Mapping[str, str]) -> str:
    """Which columns are outside the interval, and on which side."""
    others = [name for name in line.told["accuracy"] if name != GENERATED]
    beats, beaten = line.told["beats"], line.told["beaten_by"]
    undecided = [name for name in others if name not in (*beats, *beaten)]
    parts = (("beats", beats), ("is beaten by", beaten), ("is not told apart from", undecided))
    told = [f"{verb} {', '.join(above[name] for name in which)}" for verb, which in parts if which]
    return f"{line.name}: generated {'; '.join(told) or 'has no opponent'}"


def _drawn(document: Mapping[str, Any]) -> str:
    datasets, draws = document["datasets"], document["options"]["draws"]
    places = " or ".join(dict.fromkeys(f"its {one['prompts_from']}" for one in datasets))
    counts = sorted({one["prompts"] for one in datasets})
    prompts = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    return (
        f"generated: the mean of {draws} adapters a dataset, each from {prompts} prompts without "
        f"labels out of {places}; [95 % interval], compared with the other columns' values as they "
        "stand, without an interval of their own"
    )


def _of(group: str, groups: Mapping[str, Any]) -> str:
    return f" of {group.replace('_', ' ')}" if len(groups) > 1 else ""


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


HIGHLIGHT, PLAIN, BOUND = "#d1495b", "#8d99ae", "#2b2d42"
COLOURS = {GENERATED: HIGHLIGHT, ORACLE: BOUND}
PANELS_A_ROW, MOST_PANELS = 3, 12


def draw(document: Mapping[str, Any], title: str, file: Path) -> None:
    """Accuracy of every contestant, a panel per line of the table; of very many, the average. The
    generated adapter is highlighted, its 95 % interval a whisker."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels = lines(document)
    panels = panels if len(panels) <= MOST_PANELS else panels[-1:]
    across = min(len(panels), PANELS_A_ROW)
    down = -(-len(panels) // across)
    height = 0.9 + (0.7 + 0.38 * len(document["columns"])) * down
    figure, axes = plt.subplots(
        down,
        across,
        figsize=(max(4.2 * across, 7), height),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for axis, panel in zip(axes.flat, panels, strict=False):
        _fill(axis, panel, titles(document["options"]["shots"]))
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    axes.flat[0].invert_yaxis()  # of all: they share it
    figure.suptitle(title)
    figure.supxlabel("exact match")
    with written_atomically(file) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)


def _fill(axis: Any, line: Line, above: Mapping[str, str]) -> None:
    accuracy, intervals = line.told["accuracy"], line.told.get("interval", {})
    for place, (name, value) in enumerate(accuracy.items()):
        low, high = intervals.get(name, (value, value))
        whisker = [[value - low], [high - value]] if name in intervals else None
        axis.barh(place, value, color=COLOURS.get(name, PLAIN), xerr=whisker, capsize=3)
        axis.text(max(value, high) + 0.03, place, f"{value:.2f}", va="center", fontsize=9)
    axis.set(title=line.name, xlim=(0, 1.18), xticks=[0, 0.5, 1])
    axis.set_yticks(range(len(accuracy)), [above[name] for name in accuracy])
    axis.spines[["top", "right"]].set_visible(False)
