"""The analysis as one HTML file: no script, nothing from elsewhere, light or dark as the reader."""

from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from loragen import __version__
from loragen.core.analysis.figures import (
    comparison_figure,
    drift_figure,
    modules_figure,
    overlay_figure,
    sample_figure,
)
from loragen.core.analysis.report import Analysis, Report, by_tensor
from loragen.core.files import write_text

MOST_SHOWN = 8
"""Lines of one kind of warning."""


@dataclass(frozen=True)
class Warned:
    title: str
    lines: list[str]
    more: int


def write_page(file: Path, analysis: Analysis) -> None:
    write_text(file, page(analysis))


def page(analysis: Analysis) -> str:
    environment = Environment(
        loader=PackageLoader("loragen.core.analysis", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    return environment.get_template("page.html").render(
        analysis=analysis,
        warnings=warned(analysis),
        version=__version__,
        overlay=_overlay(analysis.collections),
        comparisons=[(c, Markup(comparison_figure(c))) for c in analysis.comparisons],
        collections=[(report, _figures(report)) for report in analysis.collections],
    )


def warned(analysis: Analysis) -> list[Warned]:
    """What a reader has to know before any number."""
    reports = analysis.collections
    found = {
        "NaN or infinity": [line for r in reports for line in _placed(r, r.not_finite)],
        "all zero": [line for r in reports for line in _placed(r, r.zero)],
        "dead: ΔW next to nothing beside the others": [
            f"{r.name}: {line}" for r in reports for line in r.dead
        ],
        "equal, bit for bit": [" = ".join(twins.files) for twins in analysis.twins],
        "scaling unknown: ΔW is taken as B A": [r.name for r in reports if r.scaling is None],
        "not compared": analysis.not_compared,
    }
    return [
        Warned(title, lines[:MOST_SHOWN], max(0, len(lines) - MOST_SHOWN))
        for title, lines in found.items()
        if lines
    ]


def _placed(report: Report, found: list[str]) -> list[str]:
    """With the collection's name, where that is not the file's own."""
    lines = by_tensor(found)
    alone = report.name == report.drift[0].checkpoint
    return lines if alone else [f"{report.name}/{line}" for line in lines]


def number(value: float | None) -> str:
    return "–" if value is None or not isfinite(value) else f"{value:.4g}"


def _overlay(reports: list[Report]) -> Markup | None:
    moving = [report for report in reports if report.checkpoints > 1]
    return Markup(overlay_figure(moving)) if len(moving) > 1 else None


def _figures(report: Report) -> list[tuple[Markup, str]]:
    """(plot, what it shows), as far as there is something to show."""
    figures = []
    if report.modules:
        caption = "The last checkpoint: where the adapter acts, and in how many directions."
        figures.append((Markup(modules_figure(report.modules)), caption))
    if report.checkpoints > 1:
        caption = (
            "Two lines that lie together: a straight way. The path far above: noise, or turns."
        )
        figures.append((Markup(drift_figure(report)), caption))
    if report.sample:
        caption = (
            f"{len(report.sample.checkpoints)} of {report.checkpoints} checkpoints, evenly spaced. "
            "An arc alone proves nothing: a random walk draws one, too."
        )
        figures.append((Markup(sample_figure(report.sample)), caption))
    return figures
