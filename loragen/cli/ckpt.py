"""`loragen ckpt`: know what the weights are."""

from pathlib import Path
from typing import Annotated, Any

import typer

from loragen.cli import render
from loragen.cli.options import Json

app = typer.Typer(no_args_is_help=True, help="Look into checkpoints.")

MOST_ROWS = 12


@app.callback()
def group() -> None:
    """Keeps `analyze` a subcommand while it is the only one."""


@app.command()
def analyze(
    paths: Annotated[
        list[Path], typer.Argument(help="Runs, folders of checkpoints, adapters, or single files.")
    ],
    every: Annotated[
        bool, typer.Option("--all", help="Every module and checkpoint, however many.")
    ] = False,
    json: Json = False,
) -> None:
    """Norms of A, B and ΔW per layer and module, drift along the steps, size, NaN and zeros.

    Exits with 1 where a tensor is not finite.
    """
    from loragen.core.errors import UsageError

    for path in paths:
        if not path.exists():
            raise UsageError(f"{path}: no checkpoints or adapters there")

    from loragen.core.analysis.collection import analyze as analyze_path

    reports = [analyze_path(path) for path in paths]
    if json:
        documents = [report.as_dict() for report in reports]
        render.answer_json(documents[0] if len(documents) == 1 else documents)
    else:
        for report in reports:
            _show(report, None if every else MOST_ROWS)
    if any(report.not_finite for report in reports):
        raise typer.Exit(1)


def _show(report: Any, most: int | None) -> None:
    scaling = "unknown, ΔW = B A" if report.scaling is None else f"{report.scaling:g}"
    render.answer(
        f"{report.path}\n{report.checkpoints} checkpoints, {report.bytes / 2**20:.1f} MiB; "
        f"{report.values:,} values in {report.tensors} tensors ({', '.join(report.dtypes)}); "
        f"scaling {scaling}\n"
    )
    rows = [(m.module, m.rank, m.norm_a, m.norm_b, m.norm_delta) for m in report.modules]
    _table(("module (last checkpoint)", "rank", "‖A‖", "‖B‖", "‖ΔW‖"), rows, most)
    if len(report.drift) > 1:
        steps = [(d.checkpoint, d.norm_delta, d.from_first, d.from_previous) for d in report.drift]
        _table(("checkpoint", "‖ΔW‖", "from first", "from previous"), steps, most)
    for title, found in (("NaN or infinity", report.not_finite), ("all zero", report.zero)):
        shown = found if most is None else found[:most]
        more = f"\n  and {len(found) - len(shown)} more" if len(found) > len(shown) else ""
        render.answer(f"{title}: " + ("none" if not found else "\n  " + "\n  ".join(shown) + more))
    render.answer("")


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
