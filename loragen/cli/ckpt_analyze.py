"""`loragen ckpt analyze`: what checkpoints are, one by one, as a path, and side by side."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from loragen.cli import render
from loragen.cli.options import Force, Json
from loragen.core.analysis.report import (
    Analysis,
    Comparison,
    ModuleReport,
    Report,
    by_tensor,
)
from loragen.core.errors import UsageError

MOST_ROWS = 12
MOST_IN_FULL = 3
"""Collections that are shown module by module; of more, only --all shows that."""
RANKS = ("stable rank", "effective rank")
MOST_COLLECTIONS_IN_A_MATRIX = 8
SECONDS_BETWEEN_LINES = 10.0


def analyze(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(help="Runs, folders of runs, of checkpoints or adapters, or single files."),
    ] = None,
    checkpoint_dir: Annotated[list[Path] | None, typer.Option(hidden=True)] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Every module and checkpoint, however many.")
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Also a page with plots; works offline."),
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Norms, spectra and ranks of ΔW, drift and path, damage; several collections side by side.

    docs/analysis.md explains every number. Exits with 1 where a tensor is not finite.
    """
    places = [*(paths or ()), *(checkpoint_dir or ())]
    if not places:
        raise UsageError("nothing to analyse: name a run, a folder of runs, an adapter or a file")
    for path in places:
        if not path.exists():
            raise UsageError(f"{path}: no checkpoints or adapters there")
    if html is not None:
        refuse_existing_file(html, force)

    from loragen.core.analysis.analyze import analyze as analyze_paths

    analysis = analyze_paths(places, Told())
    if html is not None:
        from loragen.core.analysis.page import write_page

        write_page(html, analysis)
        render.note(f"wrote {html}")
    if json:
        render.answer_json(analysis.as_dict())
    else:
        _show(analysis, None if every else MOST_ROWS)
    if any(report.not_finite for report in analysis.collections):
        raise typer.Exit(1)


class Told:
    """A line on stderr every ten seconds, none for what is quick."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, name: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now >= self._last + SECONDS_BETWEEN_LINES:
            self._last = now
            render.note(f"{name}: {done}/{total} checkpoints")


def refuse_existing_file(file: Path, force: bool) -> None:
    if file.is_dir():
        raise UsageError(f"{file} is a directory; --html is a file")
    if file.exists() and not force:
        raise UsageError(f"{file} exists already; choose another place or add --force")


def _show(analysis: Analysis, most: int | None) -> None:
    in_full = most is None or len(analysis.collections) <= MOST_IN_FULL
    for report in analysis.collections:
        _show_collection(report, most, in_full)
    if len(analysis.collections) > 1:
        _show_side_by_side(analysis.collections, most)
    for comparison in analysis.comparisons:
        _show_cosines(comparison, most)
    for line in analysis.not_compared:
        render.answer(f"not compared: {line}")
    _list("equal, bit for bit", [" = ".join(twins.files) for twins in analysis.twins], most)


def _show_collection(report: Report, most: int | None, in_full: bool) -> None:
    scaling = "unknown, ΔW = B A" if report.scaling is None else f"{report.scaling:g}"
    render.answer(
        f"{report.path}\n{_checkpoints(report.checkpoints)}, {report.bytes / 2**20:.1f} MiB; "
        f"{report.values:,} values in {report.tensors} tensors ({', '.join(report.dtypes)}); "
        f"scaling {scaling}"
    )
    if in_full:
        render.answer("")
        _show_modules(report, most)
        _show_drift(report, most)
    for title, found in (
        ("NaN or infinity", by_tensor(report.not_finite)),
        ("all zero", by_tensor(report.zero)),
        ("dead (ΔW next to nothing beside the others)", report.dead),
    ):
        if in_full or found:
            _list(title, found, most)
    render.answer("")


def _checkpoints(count: int) -> str:
    return f"{count} checkpoint" if count == 1 else f"{count} checkpoints"


def _show_modules(report: Report, most: int | None) -> None:
    _table(
        ("module (last checkpoint)", "rank", "‖A‖", "‖B‖", "‖ΔW‖", "σ₁", *RANKS),
        [
            (m.module, m.rank, m.norm_a, m.norm_b, m.norm_delta, m.sigma_1, *_ranks(m))
            for m in report.modules
        ],
        most,
    )


def _show_drift(report: Report, most: int | None) -> None:
    if len(report.drift) < 2:
        return
    steps = [(d.checkpoint, d.norm_delta, d.from_first, d.from_previous) for d in report.drift]
    _table(("checkpoint", "‖ΔW‖", "from first", "from previous"), steps, most)
    render.answer(_path(report) + "\n")


def _path(report: Report) -> str:
    """The drift in words: how long, how straight, in how many directions."""
    text = f"path {report.path_length:.4g}, displacement {report.displacement:.4g}"
    if report.detour is not None:
        text += f": {report.detour:.3g} times the straight line"
    if report.sample and report.sample.pca:
        shares = ", ".join(f"{share:.1%}" for share in report.sample.pca.shares)
        text += f"\nprincipal components of ΔW: {shares} of the variance"
        if len(report.sample.checkpoints) < report.checkpoints:
            text += f" (of {len(report.sample.checkpoints)} evenly spaced checkpoints)"
    return text


def _show_side_by_side(reports: Sequence[Report], most: int | None) -> None:
    path = ("displacement", "path", "path / displacement")
    _table(
        ("collection", "checkpoints", "mean ‖ΔW‖", *path, *RANKS),
        [
            (
                r.name,
                r.checkpoints,
                r.mean_norm,
                r.displacement,
                r.path_length,
                r.detour,
                *_ranks(r),
            )
            for r in reports
        ],
        most,
    )


def _ranks(of: ModuleReport | Report) -> tuple[float, float]:
    """Under the columns `RANKS`."""
    return of.stable_rank, of.effective_rank


def _show_cosines(comparison: Comparison, most: int | None) -> None:
    """Matrices that a terminal holds; larger ones are for the page and --json."""
    names = comparison.collections
    if most is not None and len(names) > MOST_COLLECTIONS_IN_A_MATRIX:
        render.answer(f"cosines of {len(names)} collections: --all, --html or --json show them\n")
        return
    matrices = {"cosine of the last ΔW": comparison.cosine_last}
    if any(len(files) > 1 for files in comparison.checkpoints):
        matrices["cosine of the mean ΔW"] = comparison.cosine_mean
    for title, matrix in matrices.items():
        rows = [
            (f"{i} {name}", *(f"{value:.3f}" for value in row))
            for i, (name, row) in enumerate(zip(names, matrix, strict=True), start=1)
        ]
        render.answer(render.columns((title, *map(str, range(1, len(names) + 1))), rows) + "\n")


def _list(title: str, found: Sequence[str], most: int | None) -> None:
    shown = found if most is None else found[:most]
    more = f"\n  and {len(found) - len(shown)} more" if len(found) > len(shown) else ""
    render.answer(f"{title}: " + ("none" if not found else "\n  " + "\n  ".join(shown) + more))


def _table(header: tuple[str, ...], rows: list[tuple[Any, ...]], most: int | None) -> None:
    """All rows, or the first and last few with a line that says how many are between."""
    if most is None or len(rows) <= most:
        render.answer(render.columns(header, rows) + "\n")
        return
    half = most // 2
    lines = render.columns(header, [*rows[:half], *rows[-half:]]).splitlines()
    hidden = len(rows) - 2 * half
    lines.insert(1 + half, f"... {hidden} more (--all shows them) ...")
    render.answer("\n".join(lines) + "\n")
