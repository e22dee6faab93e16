"""`loragen ckpt`: analyse checkpoints, trace what they were trained on, convert old ones."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from loragen.cli import completion, options, render
from loragen.cli.progress import checkpoint_progress
from loragen.core.errors import (
    EXIT_FAILED,
    DataError,
    LoragenError,
    UsageError,
    counted,
    shortened,
)
from loragen.core.hub import local_path
from loragen.core.outputs import is_sealed, refuse_existing_file, refuse_input
from loragen.core.page import need_library

if TYPE_CHECKING:
    from loragen.core.analysis.report import Analysis, Comparison, SeriesReport
    from loragen.core.analysis.tokenized import Tokenized
    from loragen.legacy.convert import ConversionResult

app = typer.Typer(no_args_is_help=True, help="Look into checkpoints, and convert old ones.")

MAX_ROWS = 12
"""The most rows of a table, without --all."""
MAX_IN_FULL = 3
"""The most series that are shown module by module, without --all."""
MAX_MATRIX = 8
"""The most series in a matrix of cosines, without --all."""
RANKS = {"stable rank": "stable_rank", "effective rank": "effective_rank"}


@app.command("analyze")
def ckpt_analyze(
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            help="Runs, folders of runs, of checkpoints or of adapters, files, or hf://owner/name.",
            autocompletion=completion.runs,
        ),
    ] = None,
    checkpoint_dir: Annotated[list[str] | None, typer.Option(hidden=True)] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Show every module and checkpoint, however many.")
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Also write a page with plots."),
    ] = None,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Print norms, spectra and ranks of ΔW, drift, path and damage, and compare series.

    docs/analysis.md explains every number. Exits with 1 if a tensor is not finite.
    """
    given = [local_path(one) for one in (*(paths or ()), *(checkpoint_dir or ()))]
    if not given:
        raise UsageError("nothing to analyse; name a run, a folder of runs, an adapter or a file")
    for path in given:
        if not path.exists():
            raise UsageError(f"{path}: no checkpoints or adapters there")
    if html is not None:
        refuse_input(html, given)
        refuse_existing_file(html, force, is_sealed)
        need_library("--html")

    from loragen.core.analysis.series import analyze_checkpoints

    analysis = analyze_checkpoints(given, checkpoint_progress())
    if json:
        render.answer_json(analysis.as_dict())
    else:
        _print_analysis(analysis, None if every else MAX_ROWS)
    if html is not None:
        from loragen.core.analysis.page import analysis_page

        analysis_page(analysis).write(html)
        render.note(f"wrote {html}")
    if any(report.not_finite for report in analysis.series):
        raise typer.Exit(EXIT_FAILED)


@app.command("test")
def ckpt_test(
    file: Annotated[
        Path | None,
        typer.Argument(
            help="A .ckpt, .pt, .safetensors or PEFT directory, or a run (its newest one).",
            autocompletion=completion.runs,
        ),
    ] = None,
    checkpoint_file: Annotated[Path | None, typer.Option(hidden=True)] = None,
    max_tokens: Annotated[
        str, typer.Option("--max-tokens", metavar="N|auto", help="The most tokens allowed.")
    ] = "auto",
    token_dim: Annotated[
        int, typer.Option("--token-dim", min=1, help="Values of one token.")
    ] = 384,
    json: options.Json = False,
) -> None:
    """Tokenise one adapter as a generator does: its layout, tokens, fill, and the round trip.

    Exits with 1 if it needs more than --max-tokens, or does not come back bit for bit.
    """
    path = file or checkpoint_file
    if path is None or (file and checkpoint_file):
        raise UsageError("one checkpoint is needed: loragen ckpt test FILE")
    most: int | Literal["auto"] = "auto"
    if max_tokens != "auto":
        if not max_tokens.isdecimal() or int(max_tokens) == 0:
            raise UsageError(f"--max-tokens: expected auto or a number above 0 (got {max_tokens})")
        most = int(max_tokens)
    if not path.exists():
        raise UsageError(f"{path}: no such checkpoint")

    from loragen.core.analysis.tokenized import tokenized

    report = tokenized(path, token_dim, most)
    if json:
        render.answer_json(asdict(report))
    else:
        _print_tokens(report)
    if not report.fits:
        raise DataError(
            f"{report.file}: it needs {report.tokens} tokens of {token_dim} values, more than "
            f"--max-tokens {report.max_tokens}; give {report.tokens} or auto"
        )
    if report.bits_changed:
        raise DataError(f"{report.file}: the tokens do not give back the same values")


@app.command("lines")
def ckpt_lines(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="CKPT", help="A checkpoint of a run, or a run.", autocompletion=completion.runs
        ),
    ],
    step: Annotated[
        int | None,
        typer.Option("--step", min=1, help="Any step of the run, with a checkpoint or without."),
    ] = None,
    json: options.Json = False,
) -> None:
    """Print the lines of the dataset that the step of a checkpoint was trained on.

    They are computed from the run's seed: this needs the unchanged dataset, but no --track-batches.
    """
    from loragen.core.lora.provenance import row_hash, traced_run
    from loragen.core.run.directory import LoraManifest, Run

    if not path.exists():
        raise UsageError(f"{path}: no such run or checkpoint; name the run and give --step N")
    run = Run.open(path, LoraManifest)
    traced = traced_run(run)
    step = step or _named_step(path)
    if step > traced.done_steps:
        raise UsageError(
            f"{run.directory}: no step {step}; the run has done {traced.done_steps} steps"
        )
    rate = traced.rate(step)
    rows = [
        {"line": row.line, "hash": row_hash(row), "prompt": shortened(row.prompt, 60)}
        for row in traced.provenance.rows_of(step)
    ]
    document = {
        "run": str(run.directory),
        "file": run.manifest.dataset.path,
        "step": step,
        "stage": rate.stage,
        "learning_rate": rate.learning_rate,
        "rows": rows,
    }
    header = f"step {step}, stage {rate.stage}, learning rate {rate.learning_rate:g}"
    table = render.columns(("line", "hash", "prompt"), [tuple(row.values()) for row in rows])
    render.answer_either(json, document, f"{document['file']}\n{header}\n\n{table}")


@app.command("convert")
def ckpt_convert(
    sources: Annotated[
        list[Path],
        typer.Argument(help="Original runs, folders with many, or folders of checkpoints."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The directory of the run directories.")
    ] = Path("runs"),
    base_model: options.BaseModelName = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            "--dataset", help="A name under --data-root, or a file; for a single dataset."
        ),
    ] = None,
    data_root: options.DataRoot = options.DATA_ROOT,
    alpha: options.Alpha = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="The training's own YAML: alpha, base, schedule, ..."),
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out checkpoints that are broken or differ.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Convert experiments of the original scripts to run directories that `gen train` reads.

    Reads experiments/<name>/<dataset>/<run>/{models,checkpoints,logs}: .pt, .pth, .bin, .ckpt,
    .safetensors, PEFT and Trainer directories. Only the LoRA part of a full model is read. A run
    that was converted before stays as it is. Prints the run directories.
    """
    from loragen.core.outputs import check_writable, refuse_file
    from loragen.legacy.experiments import find_runs

    refuse_file(output)
    check_writable(output)
    runs = [run for source in sources for run in find_runs(source)]

    from loragen.legacy.convert import ConversionOptions, check_one_dataset, convert

    chosen = ConversionOptions(output, base_model, dataset, data_root, alpha, config, skip_bad)
    check_one_dataset(runs, chosen)
    documents: list[dict[str, Any]] = []
    for number, run in enumerate(runs, 1):
        render.note(f"[{number}/{len(runs)}] {run.source}")
        document: dict[str, Any] = {"source": str(run.source), "run": None, "error": None}
        try:
            converted = convert(run, chosen)
        except LoragenError as error:
            if len(runs) == 1:
                raise
            render.problems(error.problems)
            document["error"] = list(error.problems)
        else:
            for line in _remarks(converted):
                render.note(f"  {line}")
            document |= {
                "run": str(converted.directory),
                "already": converted.already,
                "left_out": converted.left_out,
                "optimizer_states": converted.optimizer_states,
                "assumed": converted.assumed,
                **converted.manifest.model_dump(),
            }
        documents.append(document)
    if json:
        render.answer_json(documents)
    else:
        for document in documents:
            if document["run"]:
                render.answer(document["run"])
    failed = [document for document in documents if document["error"]]
    if failed:
        render.note(f"{len(failed)} of {len(runs)} runs were not converted:")
        for document in failed:
            render.note(f"  {document['source']}")
        raise typer.Exit(EXIT_FAILED)


# ---- analyze


def _print_analysis(analysis: "Analysis", most: int | None) -> None:
    """Prints each series, and several in comparison; `most` is the number of rows of a table."""
    in_full = most is None or len(analysis.series) <= MAX_IN_FULL
    for report in analysis.series:
        _print_series(report, most, in_full)
    if len(analysis.series) > 1:
        columns = {
            "series": "name",
            "checkpoints": "checkpoints",
            "mean ‖ΔW‖": "mean_norm",
            "displacement": "displacement",
            "path": "path_length",
            "path / displacement": "path_ratio",
            **RANKS,
        }
        _print_table(columns, analysis.series, most)
    for comparison in analysis.comparisons:
        _print_cosines(comparison, most)
    for line in analysis.not_compared:
        render.answer(f"not compared: {line}")
    _print_list("equal, bit for bit", [" = ".join(one.files) for one in analysis.duplicates], most)


def _print_series(report: "SeriesReport", most: int | None, in_full: bool) -> None:
    from loragen.core.analysis.report import by_tensor

    scaling = " to ".join(f"{one:g}" for one in report.scalings) or "unknown, ΔW = B A"
    render.answer(
        f"{report.path}\n{counted(report.checkpoints, 'checkpoint')}, "
        f"{report.bytes / 2**20:.1f} MiB; "
        f"{counted(report.values, 'value')} in {counted(report.tensors, 'tensor')} "
        f"({', '.join(report.dtypes)}); scaling {scaling}"
    )
    if in_full:
        render.answer("")
        _print_table(
            {
                "module (last checkpoint)": "module",
                "rank": "rank",
                "‖A‖": "norm_a",
                "‖B‖": "norm_b",
                "‖ΔW‖": "norm_delta",
                "σ₁": "sigma_1",
                **RANKS,
            },
            report.modules,
            most,
        )
        if len(report.drift) > 1:
            _print_table(
                {
                    "checkpoint": "checkpoint",
                    "‖ΔW‖": "norm_delta",
                    "from first": "from_first",
                    "from previous": "from_previous",
                },
                report.drift,
                most,
            )
            render.answer(_path(report) + "\n")
    for title, found in (
        ("NaN or infinity", by_tensor(report.not_finite)),
        ("all zero", by_tensor(report.zero)),
        ("dead (‖ΔW‖ far below that of the others)", report.dead),
    ):
        if in_full or found:
            _print_list(title, found, most)
    render.answer("")


def _path(report: "SeriesReport") -> str:
    """Returns a sentence on the length, straightness, and directions of the path."""
    text = f"path {report.path_length:.4g}, displacement {report.displacement:.4g}"
    if report.path_ratio is not None:
        text += f": {report.path_ratio:.3g} times the straight line"
    if report.sample and report.sample.pca:
        shares = ", ".join(f"{share:.1%}" for share in report.sample.pca.shares)
        text += f"\nprincipal components of ΔW: {shares} of the variance"
        if len(report.sample.checkpoints) < report.checkpoints:
            text += f" (of {len(report.sample.checkpoints)} evenly spaced checkpoints)"
    return text


def _print_cosines(comparison: "Comparison", most: int | None) -> None:
    names = comparison.series
    if most is not None and len(names) > MAX_MATRIX:
        render.answer(f"cosines of {len(names)} series: --all, --html or --json show them\n")
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


def _print_list(title: str, found: Sequence[str], most: int | None) -> None:
    shown = found if most is None else found[:most]
    more = f"\n  and {len(found) - len(shown)} more" if len(found) > len(shown) else ""
    render.answer(f"{title}: " + ("none" if not found else "\n  " + "\n  ".join(shown) + more))


def _print_table(columns: Mapping[str, str], items: Sequence[object], most: int | None) -> None:
    """Prints a row per item; of more than `most`, the first and last, and a count of those between.

    `columns` is {header: attribute}.
    """
    header, rows = list(columns), [attrgetter(*columns.values())(item) for item in items]
    if most is None or len(rows) <= most:
        render.answer(render.columns(header, rows) + "\n")
        return
    half = most // 2
    lines = render.columns(header, [*rows[:half], *rows[-half:]]).splitlines()
    lines.insert(1 + half, f"... {len(rows) - 2 * half} more (--all shows them) ...")
    render.answer("\n".join(lines) + "\n")


# ---- test, lines, convert


def _print_tokens(report: "Tokenized") -> None:
    rows = [
        (
            kind.module,
            kind.matrix,
            kind.tensors,
            kind.layers or None,
            " × ".join(map(str, kind.shape)),
            kind.dtype,
            kind.tokens_each,
            kind.tokens_each * kind.tensors,
        )
        for kind in report.kinds
    ]
    header = ("module", "matrix", "tensors", "layers", "shape", "dtype", "tokens each", "tokens")
    exact = "exact, bit for bit" if not report.bits_changed else "CHANGED"
    render.answer(
        f"{report.file}\n\n{render.columns(header, rows)}\n\n"
        f"{counted(report.values, 'value')} in {counted(report.tensors, 'tensor')}\n"
        f"{report.tokens:,} tokens of {report.token_dim}, {report.fill:.1%} filled\n"
        f"round trip: {exact} ({report.bits_changed} values changed, "
        f"largest error {report.largest_error:g})"
    )


def _named_step(path: Path) -> int:
    """Returns the step in a checkpoint's name; for last.ckpt, the step in the file."""
    from loragen.core.run.directory import LAST_CHECKPOINT, checkpoint_step

    if path.is_file() and path.name == LAST_CHECKPOINT.name:
        from loragen.core.run.checkpoints import load_weights_only

        return int(load_weights_only(path)["global_step"])
    step = checkpoint_step(path) if path.is_file() else 0
    if not step:
        raise UsageError(
            f"{path}: the step is missing; name a checkpoint of the run, or give --step N"
        )
    return step


def _remarks(converted: "ConversionResult") -> list[str]:
    manifest = converted.manifest
    if converted.already:
        return [f"was converted before, to {converted.directory}; remove that to convert it again"]
    steps = manifest.steps
    rank, alpha = manifest.adapter_config["r"], manifest.adapter_config["lora_alpha"]
    lines = [
        f"{counted(len(steps), 'checkpoint')}, steps {steps[0]} to {steps[-1]}",
        f"rank {rank}, alpha {alpha:g}, base {manifest.base_model}",
    ]
    lines += [f"left out: {line}" for line in converted.left_out]
    if converted.optimizer_states < len(steps):
        lines.append(
            f"{converted.optimizer_states} of {len(steps)} have an optimizer state that fits; "
            "resuming from the others starts with a new optimizer state"
        )
    if converted.assumed:
        lines.append(f"not recorded, defaults in config.yaml: {', '.join(converted.assumed)}")
    if not manifest.dataset.path:
        lines.append(
            f"dataset {manifest.dataset.name}: no file found (--dataset FILE, --data-root); "
            "`gen train` needs `prompts: FILE` for this run"
        )
    return lines
