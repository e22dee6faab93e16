"""Curves in the terminal."""

import os
import re
import sys
from collections.abc import Mapping, Sequence

from loragen.core.errors import display_width

HEIGHT = 12
"""Lines of a chart, without its axes."""
NARROWEST = 56
"""The fewest columns of a chart beside another."""
WIDEST = 100
AXIS = 10
"""Columns beside the drawing, for the values of the axis."""
Curve = tuple[Sequence[int], Sequence[float]]


def charts(metrics: Mapping[str, Mapping[str, Curve]], width: int) -> str:
    """Returns a chart for each metric with the curves of all runs, {metric: {label: (steps,
    values)}}, side by side as far as `width` columns allow.

    Colours tell the curves apart on a terminal that has them, else other signs do; where stdout has
    no Unicode the signs are those of ASCII.
    """
    beside = max(1, min(len(metrics), width // NARROWEST))
    each = min(WIDEST, width // beside)
    drawn = [_chart(name, curves, each) for name, curves in metrics.items()]
    blocks = []
    for start in range(0, len(drawn), beside):
        row = drawn[start : start + beside]
        height = max(map(len, row))
        padded = [lines + [""] * (height - len(lines)) for lines in row]
        lines = [
            "".join(_padded(part, each) for part in parts).rstrip()
            for parts in zip(*padded, strict=True)
        ]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _chart(name: str, curves: Mapping[str, Curve], width: int) -> list[str]:
    from uniplot import plot_to_string

    has_unicode = (getattr(sys.stdout, "encoding", None) or "").lower().startswith("utf")
    colored = sys.stdout.isatty() and "NO_COLOR" not in os.environ and has_unicode
    several = len(curves) > 1
    text = plot_to_string(
        xs=[steps for steps, _ in curves.values()],
        ys=[values for _, values in curves.values()],
        lines=[True] * len(curves),
        legend_labels=list(curves) if several else None,
        color=colored and several,
        character_set="ascii" if not has_unicode or (several and not colored) else "braille",
        width=max(20, width - AXIS - 4),
        height=HEIGHT,
        x_gridlines=[],
        y_gridlines=[],
        title=name,
    )
    if not has_unicode:
        text = text.translate(str.maketrans("┌┐└┘─│┤├┬┴┼", "++++-|+++++"))
    return [line.rstrip() for line in text.splitlines()]


def _padded(text: str, width: int) -> str:
    shown = display_width(re.sub(r"\x1b\[[0-9;]*m", "", text))
    return text + " " * max(0, width - shown)
