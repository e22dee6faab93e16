"""One HTML page for everything that is looked at: runs, checkpoints, evaluations. Light.

A page is a title and sections of blocks: texts, tables, plots, notes. It is one file that asks
nothing of a network: the plotting library (Plotly) lies in it, compressed. It follows the reader's
light or dark mode, prints in black on white, and its plots stand below each other on a phone.
"""

import base64
import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Any

from loragen import __version__
from loragen.core.errors import UsageError, pip_install
from loragen.core.files import write_text
from loragen.core.outputs import sealed

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
"""The palette of Okabe & Ito, distinguishable with any colour vision, on white and on black."""
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "pentagon")
"""Dashes and symbols tell the lines apart whose colours are the same."""
SEQUENTIAL = "Viridis"
SIGNED = "PuOr"
"""The colour scale of values from -1 to 1, pale at 0."""
MOST_NUMBERS = 8
"""The most columns of a heat map whose cells have their numbers written into them; those of a wider
one are shown when they are pointed at."""
MOST_POINTS = 1200
"""The most points of a line: about two for each column of pixels."""


@dataclass(frozen=True)
class Link:
    """A word that leads to a section of the page."""

    text: str
    anchor: str


Cell = str | float | int | Link | None


@dataclass(frozen=True)
class Text:
    text: str
    soft: bool = False


@dataclass(frozen=True)
class Code:
    """A command to be copied."""

    text: str


@dataclass(frozen=True)
class Note:
    """Something that must not be overlooked."""

    title: str
    lines: Sequence[str]
    more: int = 0
    """Further lines, which are not shown."""


@dataclass(frozen=True)
class Facts:
    """A few short values with their names, as tiles."""

    values: Mapping[str, Cell]


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows; a header of "" makes a table of two columns, names
    and texts."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""

    @property
    def kind(self) -> str:
        return "numbers" if any(self.header) else "texts"


@dataclass(frozen=True)
class Plot:
    """A figure of Plotly, without colours of text, axes and background: these are the page's."""

    title: str
    figure: str
    """JSON, from `figure`."""
    caption: str = ""
    height: int = 300
    """Pixels, without the legend."""
    log: bool = False
    """Whether the page offers a logarithmic axis of the values."""


@dataclass(frozen=True)
class Plots:
    """Plots beside each other where the page is wide enough."""

    plots: Sequence[Plot]


@dataclass(frozen=True)
class Details:
    """Blocks that are shown once they are asked for."""

    title: str
    blocks: Sequence["Block"]


Block = Text | Code | Note | Facts | Table | Plots | Details


@dataclass(frozen=True)
class PageSection:
    title: str
    blocks: Sequence[Block]
    anchor: str = ""
    level: int = 2


@dataclass(frozen=True)
class Page:
    title: str
    lead: str
    sections: Sequence[PageSection]

    def html(self) -> str:
        """Returns the page. The same page twice is the same bytes."""
        from jinja2 import Environment, PackageLoader, StrictUndefined
        from markupsafe import Markup

        environment = Environment(
            loader=PackageLoader("loragen.core", "."),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters |= {"cell": cell_text, "kind": lambda block: type(block).__name__}
        # In a script, `<` could end it; JSON may spell it otherwise.
        environment.filters["json"] = lambda text: Markup(text.replace("<", "\\u003c"))
        return environment.get_template("page.html").render(
            page=self,
            version=__version__,
            palette=json.dumps(COLOURS),
            library=Markup(_library()) if any(map(_has_plots, self.sections)) else "",
        )

    def write(self, file: Path) -> None:
        """Writes the page, whole or not at all; its last line tells whether somebody has edited it
        since (`outputs.is_sealed`)."""
        write_text(file, sealed(self.html(), "<!-- {} -->"))


def has_library() -> bool:
    """Returns whether pages can be written."""
    return find_spec("plotly") is not None


def need_library(option: str) -> None:
    """Raises UsageError if an option needs the plotting library and it is not installed."""
    if not has_library():
        raise UsageError(f"{option} needs plotly; {pip_install('plots')}")


@cache
def _library() -> str:
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


def _has_plots(holder: Any) -> bool:
    return isinstance(holder, Plots) or any(map(_has_plots, getattr(holder, "blocks", ())))


# ---------------------------------------------------------------------------- texts


def cell_text(value: Cell) -> str:
    """Returns a cell's text: of a number four significant digits, and a dash for one that is
    missing or not finite."""
    if value is None or (isinstance(value, float) and not isfinite(value)):
        return "–"
    if isinstance(value, Link):
        return value.text
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def plain(text: str) -> str:
    """Returns a name for a figure, in which Plotly would take `<b>` and `&amp;` for markup."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("$", "&#36;")


# ---------------------------------------------------------------------------- figures


def figure(traces: Iterable[Any], x: str = "", y: str = "", **layout: Any) -> str:
    """Returns the JSON of a figure with the titles of its axes. `layout` are options of Plotly's
    layout: `xaxis_range`, `bargap`."""
    from plotly.graph_objects import Figure

    made = Figure(list(traces))
    titles = {"xaxis_title_text": x or None, "yaxis_title_text": y or None}
    margins = {"xaxis_automargin": True, "yaxis_automargin": True}
    made.update_layout(template=None, **{**titles, **margins, **layout})
    return str(made.to_json())


def line(number: int, name: str, x: Sequence[Any], y: Sequence[float], **options: Any) -> Any:
    """Returns the line of one of several series; the dash changes after every round of colours."""
    from plotly.graph_objects import Scatter

    style = {"color": COLOURS[number % len(COLOURS)], "width": 1.8}
    style["dash"] = DASHES[number // len(COLOURS) % len(DASHES)]
    at = thinned(y)
    shown = {
        "x": [x[i] for i in at],
        "y": [y[i] for i in at],
        "name": plain(name),
        "line": style,
        "mode": "lines" if len(y) > 1 else "markers",
        "marker": {"color": style["color"]},
    }
    return Scatter(**{**shown, **options})


def thinned(values: Sequence[float], most: int = MOST_POINTS) -> list[int]:
    """Returns the indices of the points that are drawn: all of them, or of more than `most` the
    first, the last, and the lowest and the highest of each of equally long parts, so that no
    outlier is lost."""
    if len(values) <= most:
        return list(range(len(values)))
    parts = (most - 2) // 2
    chosen = {0, len(values) - 1}
    for part in range(parts):
        inside = range(part * len(values) // parts, (part + 1) * len(values) // parts)
        chosen |= {min(inside, key=values.__getitem__), max(inside, key=values.__getitem__)}
    return sorted(chosen)


def heat_map(
    grid: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    label: str,
    signed: bool = False,
    **layout: Any,
) -> str:
    """Returns the JSON of a heat map, the first row on top."""
    from plotly.graph_objects import Heatmap

    scale: dict[str, Any] = {"colorscale": SIGNED if signed else SEQUENTIAL}
    if signed:
        scale |= {"zmin": -1, "zmax": 1}
    cells = Heatmap(
        z=[list(row) for row in grid],
        x=list(range(len(columns))),
        y=list(range(len(rows))),
        customdata=[[[plain(row), plain(column)] for column in columns] for row in rows],
        hovertemplate=f"%{{customdata[0]}}, %{{customdata[1]}}: {label} %{{z:.4g}}<extra></extra>",
        texttemplate="%{z:.2g}" if len(columns) <= MOST_NUMBERS else None,
        colorbar=colour_bar(label),
        xgap=1,
        ygap=1,
        **scale,
    )
    return figure(
        [cells],
        yaxis_autorange="reversed",
        **{**_ticks("xaxis", columns, 12), **_ticks("yaxis", rows, 24), **layout},
    )


def colour_bar(label: str) -> dict[str, Any]:
    """Returns the options of a colour bar above a plot, where it also has room on a phone."""
    place = {"orientation": "h", "thickness": 10, "y": 1.0, "yanchor": "bottom"}
    return {**place, "nticks": 4, "tickangle": 0, "title_text": label}


def _ticks(axis: str, names: Sequence[str], most: int) -> dict[str, Any]:
    shown = range(0, len(names), -(-len(names) // most) or 1)
    return {
        f"{axis}_tickvals": list(shown),
        f"{axis}_ticktext": [plain(names[i]) for i in shown],
        f"{axis}_showgrid": False,
        f"{axis}_zeroline": False,
    }
