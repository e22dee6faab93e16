"""The analysis as sections of a page: tables, heat maps, drift, and principal components."""

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from math import hypot, nan

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
from loragen.core.page import (
    COLOURS,
    SEQUENTIAL,
    SYMBOLS,
    Block,
    Cell,
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
    colour_bar,
    figure,
    heat_map,
    line,
    plain,
)

LONGEST_LABEL = 32
MOST_SHOWN = 8
"""The number of lines shown of one kind of warning."""
MEANING = (
    "ΔW = scaling · B A is the update that an adapter adds to a weight matrix. Norms are Frobenius "
    "norms."
)


def analysis_page(analysis: Analysis) -> Page:
    """Returns the page of `ckpt analyze --html`."""
    return Page("Analysis of checkpoints", MEANING, analysis_sections(analysis))


def analysis_sections(analysis: Analysis, level: int = 2) -> list[PageSection]:
    """Returns what is wrong, the series side by side, and a section of each series. `level` is that
    of their headings."""
    notes: list[Block] = [*_warnings(analysis)]
    if not notes:
        fine = "No NaN, no infinity, no tensor that is all zero, no dead layer, no duplicate."
        notes.append(Text(fine))
    sections = [PageSection("", notes)]
    if len(analysis.series) > 1:
        sections.append(PageSection("Side by side", _side_by_side(analysis), "side-by-side", level))
    return sections + [
        PageSection(report.name, _series(report), f"series-{i}", level)
        for i, report in enumerate(analysis.series, 1)
    ]


def _warnings(analysis: Analysis) -> list[Note]:
    reports = analysis.series
    found = {
        "NaN or infinity": [text for r in reports for text in _with_series(r, r.not_finite)],
        "all zero": [text for r in reports for text in _with_series(r, r.zero)],
        "dead (ΔW almost zero compared with the others)": [
            f"{r.name}: {text}" for r in reports for text in r.dead
        ],
        "duplicates, equal bit for bit": [" = ".join(one.files) for one in analysis.duplicates],
        "unknown scaling: ΔW is taken as B A": [r.name for r in reports if r.scaling is None],
        "not compared": analysis.not_compared,
    }
    return [
        Note(title, lines[:MOST_SHOWN], max(0, len(lines) - MOST_SHOWN))
        for title, lines in found.items()
        if lines
    ]


def _with_series(report: SeriesReport, found: list[str]) -> list[str]:
    """Returns the lines with the series' name, unless the series is that one file."""
    lines = by_tensor(found)
    single_file = report.name == report.drift[0].checkpoint
    return lines if single_file else [f"{report.name}/{text}" for text in lines]


def _side_by_side(analysis: Analysis) -> list[Block]:
    header = ["series", "checkpoints", "mean ‖ΔW‖", "displacement", "path", "path / displacement"]
    rows = [
        [
            Link(report.name, f"series-{i}"),
            report.checkpoints,
            report.mean_norm,
            report.displacement,
            report.path_length,
            report.path_ratio,
            report.stable_rank,
            report.effective_rank,
        ]
        for i, report in enumerate(analysis.series, 1)
    ]
    plots = []
    moving = [report for report in analysis.series if report.checkpoints > 1]
    if len(moving) > 1:
        lines, units = [], set()
        for i, report in enumerate(moving):
            x, unit = _x_positions([d.checkpoint for d in report.drift])
            units.add(unit)
            drift = [d.from_first for d in report.drift]
            lines.append(line(i, shortened(report.name, LONGEST_LABEL), x, drift))
        drawn = figure(lines, " or ".join(sorted(units)), "‖ΔW − first ΔW‖")
        plots.append(Plot("Drift", drawn, "The distance of each series from its first checkpoint."))
    for comparison in analysis.comparisons:
        plots += _comparison(comparison)
    table = Table([*header, "stable rank", "effective rank"], rows)
    return [table, *([Plots(plots)] if plots else [])]


def _comparison(comparison: Comparison) -> list[Plot]:
    """Returns the cosines between the last ΔW, and all samples on the same two principal axes."""
    names = [shortened(name, LONGEST_LABEL) for name in comparison.series]
    numbers = [str(number) for number in range(1, len(names) + 1)]
    drawn = heat_map(comparison.cosine_last, numbers, numbers, "cosine", signed=True)
    listed = ", ".join(f"{i} {name}" for i, name in enumerate(comparison.series, 1))
    plots = [Plot("Cosines of the last ΔW", drawn, listed, 340)]
    if comparison.pca is None:
        return [replace(plots[0], caption=f"{listed}. All series are equal.")]
    points, axes = _points(comparison.pca)
    ends = list(accumulate((len(files) for files in comparison.checkpoints), initial=0))
    paths = []
    for i, name in enumerate(names):
        own = points[ends[i] : ends[i + 1]]
        sizes = [0] * (len(own) - 1) + [9]
        symbol = SYMBOLS[i // len(COLOURS) % len(SYMBOLS)]
        marker = {"color": COLOURS[i % len(COLOURS)], "size": sizes, "symbol": symbol}
        x, y = [p[0] for p in own], [p[1] for p in own]
        files = comparison.checkpoints[i]
        paths.append(
            line(i, name, x, y, mode="lines+markers", marker=marker, text=[*map(plain, files)])
        )
    most = max(map(len, comparison.checkpoints))
    caption = (
        f"At most {most} checkpoints of each series, evenly spaced; the mark is at the last one."
    )
    return [
        *plots,
        Plot("Principal components of all ΔW", figure(paths, *axes), caption, 340),
    ]


def _series(report: SeriesReport) -> list[Block]:
    scalings = " to ".join(f"{scaling:.4g}" for scaling in report.scalings) or "unknown"
    about = (
        f"{report.path}: {report.values:,} values in {report.tensors} tensors "
        f"({', '.join(report.dtypes)}), scaling {scalings}, {report.bytes / 2**20:.1f} MiB in all"
    )
    facts = {
        "checkpoints": report.checkpoints,
        "‖ΔW‖ of the last": report.norm_delta,
        "displacement": report.displacement,
        "path / displacement": report.path_ratio,
        "mean stable rank": report.stable_rank,
        "mean effective rank": report.effective_rank,
    }
    plots = _modules(report.modules) if report.modules else []
    if report.checkpoints > 1:
        plots += _drift(report)
    if report.sample:
        plots += _sample(report.sample, report.checkpoints)
    header = ["module", "rank", "‖A‖", "‖B‖", "‖ΔW‖", "σ₁", "stable rank", "effective rank"]
    rows: list[list[Cell]] = [
        [
            m.module,
            m.rank,
            m.norm_a,
            m.norm_b,
            m.norm_delta,
            m.sigma_1,
            m.stable_rank,
            m.effective_rank,
        ]
        for m in report.modules
    ]
    table = Details("Every module of the last checkpoint", [Table(header, rows)])
    return [Text(about, soft=True), Facts(facts), *([Plots(plots)] if plots else []), table]


def _modules(modules: Sequence[ModuleReport]) -> list[Plot]:
    """Returns ‖ΔW‖ and the effective rank of the last checkpoint, by kind of module and layer."""
    kinds = list(dict.fromkeys(module.kind for module in modules))
    layers = sorted({module.layer for module in modules})
    cells: dict[tuple[str, int], list[ModuleReport]] = {}
    for module in modules:
        cells.setdefault((module.kind, module.layer), []).append(module)
    names = ["none" if layer == NO_LAYER else str(layer) for layer in layers]
    # Several modules of one kind in a layer (experts): the norm of all, the mean rank.
    norms = [
        [hypot(*(m.norm_delta for m in cells[k, i])) if (k, i) in cells else nan for i in layers]
        for k in kinds
    ]
    ranks = [
        [
            sum(m.effective_rank for m in cells[k, i]) / len(cells[k, i])
            if (k, i) in cells
            else nan
            for i in layers
        ]
        for k in kinds
    ]
    height = 120 + 24 * len(kinds)
    return [
        Plot(
            title,
            heat_map(grid, kinds, names, label),
            "The last checkpoint, from the first layer on the left to the last.",
            height,
        )
        for title, grid, label in (
            ("Size of ΔW in each module", norms, "‖ΔW‖"),
            ("Effective rank of ΔW in each module", ranks, "effective rank"),
        )
    ]


def _drift(report: SeriesReport) -> list[Plot]:
    """Returns ‖ΔW‖ over the checkpoints, and the path length beside the distance from the first."""
    x, unit = _x_positions([d.checkpoint for d in report.drift])
    norm = line(0, "‖ΔW‖", x, [d.norm_delta for d in report.drift])
    length = list(accumulate(d.from_previous for d in report.drift))
    first = [d.from_first for d in report.drift]
    lines = [line(1, "path length", x, length), line(0, "distance from the first", x, first)]
    caption = (
        "Two lines that coincide are a straight path. A path far above the distance means noise or "
        "turns."
    )
    return [
        Plot("Size of ΔW over the checkpoints", figure([norm], unit, "‖ΔW‖")),
        Plot("Drift and path", figure(lines, unit, "in units of ‖ΔW‖"), caption),
    ]


def _sample(sample: ComparedCheckpoints, of: int) -> list[Plot]:
    """Returns the cosine matrix, and the checkpoints on the first two principal axes."""
    x, unit = _x_positions(sample.checkpoints)
    names = [str(position) for position in x]
    drawn = heat_map(sample.cosine, names, names, "cosine of ΔW")
    caption = f"{len(names)} of {of} checkpoints by {unit}, evenly spaced."
    plots = [Plot("Cosines between the checkpoints", drawn, caption, 340)]
    if sample.pca is None:
        return [replace(plots[0], caption=f"{caption} All checkpoints are equal.")]
    points, axes = _points(sample.pca)
    marker = {
        "color": x,
        "colorscale": SEQUENTIAL,
        "size": 9,
        "showscale": True,
        "colorbar": colour_bar(unit),
    }
    along, across = [p[0] for p in points], [p[1] for p in points]
    path = line(0, "", along, across, mode="lines+markers", marker=marker, text=names)
    arc = "An arc alone is no evidence: a random walk makes one, too."
    return [*plots, Plot("Principal components of ΔW", figure([path], *axes), arc, 340)]


def _points(pca: PrincipalComponents) -> tuple[list[tuple[float, float]], list[str]]:
    """Returns the first two coordinates of the checkpoints, a missing second one as 0, and the
    titles of the axes."""
    points = [(one[0], one[1] if len(one) > 1 else 0.0) for one in pca.coordinates]
    shares = [*pca.shares, 0.0]
    return points, [f"axis {i}: {shares[i - 1]:.1%} of the variance" for i in (1, 2)]


def _x_positions(checkpoints: Sequence[str]) -> tuple[list[int], str]:
    """Returns the positions of checkpoints on an axis (steps, or 1, 2, 3, ...) and its label."""
    steps = [re.search(r"step[-_](\d+)", name) for name in checkpoints]
    if all(steps):
        return [int(step[1]) for step in steps if step], "optimizer step"
    return list(range(1, len(checkpoints) + 1)), "checkpoint"
