"""The analysis as one HTML file of tables and SVG plots, without scripts or external files. It
follows the reader's light or dark mode."""

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import hypot, isfinite
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from loragen import __version__
from loragen.core.adapter.layout import NO_LAYER
from loragen.core.analysis.report import (
    Analysis,
    ComparedCheckpoints,
    Comparison,
    ModuleReport,
    PrincipalComponents,
    SeriesReport,
    by_tensor,
)
from loragen.core.errors import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#123457"
"""A placeholder for the page's text colour, replaced in the SVG."""
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
"""The palette of Okabe & Ito, distinguishable with any colour vision, on white and on black."""
STYLES = ("-", "--", ":", "-.")
MARKERS = "os^Dvp"
"""Line styles and markers tell the series apart whose colours are the same."""
LONGEST_LABEL = 32
SEQUENTIAL = "viridis"
SIGNED = "PuOr"
"""The colour map of values from -1 to 1, pale at 0."""
DIGIT_WIDTH, SMALLEST_NUMBER = 0.62, 4.0
"""The width of a digit in units of the font size, and the smallest size of a cell's number; with
less room the cells of a heat map have no numbers."""
MOST_IN_A_LEGEND = 12
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a `$` in a name is a dollar
    "font.size": 9,
    "figure.constrained_layout.hspace": 0.06,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "legend.frameon": False,
} | dict.fromkeys(
    ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
)


def modules_figure(modules: Sequence[ModuleReport]) -> str:
    """Draws ‖ΔW‖ and effective rank of the last checkpoint, by kind of module and layer."""

    def draw(figure: "Figure") -> None:
        norms, ranks = figure.subplots(2, 1, sharex=True)
        kinds = list(dict.fromkeys(module.kind for module in modules))
        layers = sorted({module.layer for module in modules})
        cells: dict[tuple[int, int], list[ModuleReport]] = {}
        for module in modules:
            cell = kinds.index(module.kind), layers.index(module.layer)
            cells.setdefault(cell, []).append(module)
        norm, rank = np.full((2, len(kinds), len(layers)), np.nan)
        for cell, of in cells.items():
            # Several modules of one kind in a layer (experts): the norm of all, the mean rank.
            norm[cell] = hypot(*(module.norm_delta for module in of))
            rank[cell] = np.mean([module.effective_rank for module in of])
        shown = range(0, len(layers), max(1, len(layers) // 16))
        names = ["none" if layers[i] == NO_LAYER else str(layers[i]) for i in shown]
        for panel, grid, label in ((norms, norm, "‖ΔW‖"), (ranks, rank, "effective rank")):
            _heat_map(panel, grid, label, inches=6.6)
            panel.set(yticks=range(len(kinds)), yticklabels=kinds, xticks=shown, xticklabels=names)
        ranks.set_xlabel("layer")

    return _svg(draw, 8.6, 1.6 + 0.5 * len({module.kind for module in modules}))


def drift_figure(report: SeriesReport) -> str:
    """Draws ‖ΔW‖ over the checkpoints, and the path length beside the distance from the first."""

    from matplotlib.ticker import MaxNLocator

    def draw(figure: "Figure") -> None:
        norm, path = figure.subplots(1, 2)
        x, unit = _x_positions([d.checkpoint for d in report.drift])
        norm.plot(x, [d.norm_delta for d in report.drift], color=COLOURS[0])
        norm.set(title="size of ΔW", ylabel="‖ΔW‖", xlabel=unit)
        length = list(accumulate(d.from_previous for d in report.drift))
        path.plot(x, length, "--", color=COLOURS[1], label="path length")
        first = [d.from_first for d in report.drift]
        path.plot(x, first, color=COLOURS[0], label="distance from the first")
        path.set(title="drift and path", ylabel="in units of ‖ΔW‖", xlabel=unit)
        path.legend()
        for panel in (norm, path):
            panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))  # there is no step 4.25

    return _svg(draw, 8.6, 3.0)


def sample_figure(sample: ComparedCheckpoints) -> str:
    """Draws the cosine matrix, and the checkpoints on the first two principal axes."""
    from matplotlib.ticker import MaxNLocator

    def draw(figure: "Figure") -> None:
        matrix, plane = figure.subplots(1, 2, width_ratios=(1, 1.25))
        x, unit = _x_positions(sample.checkpoints)
        _heat_map(matrix, np.array(sample.cosine), "cosine of ΔW", inches=2.3)
        ticks = np.unique(np.linspace(0, len(sample.checkpoints) - 1, 5).round().astype(int))
        matrix.set(xticks=ticks, yticks=ticks, xticklabels=x[ticks], yticklabels=x[ticks])
        matrix.set(xlabel=unit, ylabel=unit, aspect="equal", title="cosine of ΔW")
        if sample.pca is None:
            plane.set_axis_off()
            plane.text(0.5, 0.5, "all checkpoints are equal", ha="center")
            return
        points = _points(plane, sample.pca)
        plane.plot(*points.T, color=COLOURS[0], linewidth=1)
        dots = plane.scatter(*points.T, c=x, cmap=SEQUENTIAL, s=22, zorder=3)
        plane.annotate("first", points[0], (4, 6), textcoords="offset points")
        plane.annotate("last", points[-1], (4, 6), textcoords="offset points")
        whole = MaxNLocator(6, integer=True)
        plane.figure.colorbar(dots, label=unit, ticks=whole).outline.set_visible(False)
        plane.set_title("principal components of ΔW")

    return _svg(draw, 8.6, 3.4)


def overlay_figure(reports: Sequence[SeriesReport]) -> str:
    """Draws the drift of several series in one plot."""
    from matplotlib.ticker import MaxNLocator

    def draw(figure: "Figure") -> None:
        panel = figure.subplots()
        units = set()
        for i, report in enumerate(reports):
            x, unit = _x_positions([d.checkpoint for d in report.drift])
            units.add(unit)
            drift = [d.from_first for d in report.drift]
            named = shortened(report.name, LONGEST_LABEL)
            panel.plot(x, drift, **_line_style(i), label=named)
        panel.set(xlabel=" or ".join(sorted(units)), ylabel="‖ΔW − first ΔW‖", title="drift")
        panel.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        _legend(panel, len(reports))

    return _svg(draw, 8.6, 3.2)


def comparison_figure(comparison: Comparison) -> str:
    """Draws the cosines between the last ΔW, and all samples on the same two principal axes."""

    def draw(figure: "Figure") -> None:
        matrix, plane = figure.subplots(1, 2, width_ratios=(1, 1.1))
        numbers = np.arange(len(comparison.series))
        cosine = np.array(comparison.cosine_last)
        _heat_map(matrix, cosine, "cosine of ΔW", inches=2.3, signed=True)
        matrix.set(title="cosine of the last ΔW", aspect="equal")
        if len(numbers) <= MOST_IN_A_LEGEND:
            matrix.set(xticks=numbers, yticks=numbers)
            matrix.set(xticklabels=numbers + 1, yticklabels=numbers + 1)
        matrix.set(xlabel="series", ylabel="series")
        if comparison.pca is None:
            plane.set_axis_off()
            plane.text(0.5, 0.5, "all series are equal", ha="center")
            return
        points = _points(plane, comparison.pca)
        ends = list(accumulate((len(files) for files in comparison.checkpoints), initial=0))
        for i, name in enumerate(comparison.series):
            own, style = points[ends[i] : ends[i + 1]], _line_style(i)
            plane.plot(*own.T, **style, linewidth=1)
            last = {"color": style["color"], "marker": MARKERS[i // len(COLOURS) % len(MARKERS)]}
            named = f"{i + 1} {shortened(name, LONGEST_LABEL)}"
            plane.plot(*own[-1], linestyle="", label=named, **last)
        plane.set_title("principal components of all (mark: the last)")
        _legend(plane, len(numbers))

    return _svg(draw, 8.6, 3.8)


def _points(axes: "Axes", pca: PrincipalComponents) -> np.ndarray:
    """Labels the axes and returns ``[checkpoints, 2]``; a missing second coordinate is 0."""
    points = np.array(pca.coordinates)
    if points.shape[1] == 1:
        points = np.concatenate([points, np.zeros_like(points)], axis=1)
    axes.margins(0.1)
    axes.locator_params(axis="x", nbins=5)
    shares = [*pca.shares, 0.0]
    axes.set_xlabel(f"axis 1: {shares[0]:.1%} of the variance")
    axes.set_ylabel(f"axis 2: {shares[1]:.1%} of the variance")
    return points[:, :2]


def _heat_map(
    panel: "Axes", grid: np.ndarray, label: str, inches: float, signed: bool = False
) -> None:
    """Colours each cell, and writes its number into it if all have room in a panel of `inches`."""
    colours = SIGNED if signed else SEQUENTIAL
    image = panel.imshow(grid, cmap=colours, aspect="auto", interpolation="none")
    if signed:
        image.set_clim(-1.0, 1.0)
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0)
    bar = panel.figure.colorbar(image, ax=panel, label=label)
    bar.outline.set_visible(False)
    texts = {at: f"{value:.2g}" for at, value in np.ndenumerate(grid) if isfinite(value)}
    longest = max(map(len, texts.values()), default=1)
    size = min(7.0, 72 * inches / grid.shape[1] / (longest + 1) / DIGIT_WIDTH)
    if size < SMALLEST_NUMBER:
        return
    for (row, column), text in texts.items():
        red, green, blue, _ = image.cmap(image.norm(grid[row, column]))
        ink = "#000000" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.45 else "#ffffff"
        panel.text(column, row, text, ha="center", va="center", color=ink, size=size)


def _legend(panel: "Axes", lines: int) -> None:
    if lines <= MOST_IN_A_LEGEND:
        panel.legend(fontsize=8, loc="best")


def _line_style(number: int) -> dict[str, Any]:
    """Returns a colour and a line style; the style changes after every round of colours."""
    style = STYLES[number // len(COLOURS) % len(STYLES)]
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": style}


def _x_positions(checkpoints: Sequence[str]) -> tuple[np.ndarray, str]:
    """Returns the positions of checkpoints on an axis (steps, or 1, 2, 3, ...) and its label."""
    steps = [re.search(r"step[-_](\d+)", name) for name in checkpoints]
    if all(steps):
        return np.array([int(step[1]) for step in steps if step]), "optimizer step"
    return np.arange(1, len(checkpoints) + 1), "checkpoint"


def _svg(draw: Callable[["Figure"], None], width: float, height: float) -> str:
    """Draws a figure of a size in inches; returns an `<svg>` element for HTML."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    out = io.StringIO()
    salt = {"svg.hashsalt": draw.__qualname__}  # the same page twice is the same bytes
    with mpl.rc_context(STYLE | salt), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser has the glyph
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    svg = out.getvalue()[out.getvalue().index("<svg") :]
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)  # HTML needs none
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", svg)
    svg = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", svg, count=1)
    return svg.replace(INK, "currentColor")


MOST_SHOWN = 8
"""The number of lines shown of one kind of warning."""


@dataclass(frozen=True)
class PageWarning:
    """One kind of warning, with the lines that are shown."""

    title: str
    lines: list[str]
    more: int
    """Further lines, which are not shown."""


def page(analysis: Analysis) -> str:
    """Returns the HTML of the page."""
    environment = Environment(
        loader=PackageLoader("loragen.core.analysis", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = format_number
    moving = [report for report in analysis.series if report.checkpoints > 1]
    return environment.get_template("page.html").render(
        analysis=analysis,
        warnings=page_warnings(analysis),
        version=__version__,
        overlay=Markup(overlay_figure(moving)) if len(moving) > 1 else None,
        comparisons=[(c, Markup(comparison_figure(c))) for c in analysis.comparisons],
        series=[(report, _figures(report)) for report in analysis.series],
    )


def page_warnings(analysis: Analysis) -> list[PageWarning]:
    """Returns the damage and other warnings for the top of the page."""
    reports = analysis.series
    found = {
        "NaN or infinity": [line for r in reports for line in _with_series(r, r.not_finite)],
        "all zero": [line for r in reports for line in _with_series(r, r.zero)],
        "dead (ΔW almost zero compared with the others)": [
            f"{r.name}: {line}" for r in reports for line in r.dead
        ],
        "duplicates, equal bit for bit": [" = ".join(one.files) for one in analysis.duplicates],
        "unknown scaling: ΔW is taken as B A": [r.name for r in reports if r.scaling is None],
        "not compared": analysis.not_compared,
    }
    return [
        PageWarning(title, lines[:MOST_SHOWN], max(0, len(lines) - MOST_SHOWN))
        for title, lines in found.items()
        if lines
    ]


def _with_series(report: SeriesReport, found: list[str]) -> list[str]:
    """Returns the lines with the series' name, unless the series is that one file."""
    lines = by_tensor(found)
    single_file = report.name == report.drift[0].checkpoint
    return lines if single_file else [f"{report.name}/{line}" for line in lines]


def format_number(value: float | None) -> str:
    """Returns four significant digits, or a dash for a number that is missing or not finite."""
    return "–" if value is None or not isfinite(value) else f"{value:.4g}"


def _figures(report: SeriesReport) -> list[tuple[Markup, str]]:
    """Returns the (plot, caption) of every figure of a series."""
    figures = []
    if report.modules:
        caption = "The last checkpoint: size and effective rank of ΔW in each module."
        figures.append((Markup(modules_figure(report.modules)), caption))
    if report.checkpoints > 1:
        caption = (
            "Two lines that coincide are a straight path. A path far above the distance means "
            "noise or turns."
        )
        figures.append((Markup(drift_figure(report)), caption))
    if report.sample:
        caption = (
            f"{len(report.sample.checkpoints)} of {report.checkpoints} checkpoints, evenly spaced. "
            "An arc alone is no evidence: a random walk makes one, too."
        )
        figures.append((Markup(sample_figure(report.sample)), caption))
    return figures
