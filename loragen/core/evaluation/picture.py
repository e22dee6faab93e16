"""The table as one picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loragen.core.evaluation.columns import GENERATED, ORACLE, titles
from loragen.core.evaluation.report import Line, lines
from loragen.core.files import written_atomically

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
