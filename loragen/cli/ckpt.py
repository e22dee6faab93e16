"""`loragen ckpt analyze`: what checkpoints are, one by one, as a path, and side by side.

`loragen ckpt test`: is a checkpoint one that a generator can learn?

`loragen ckpt lines`: which rows of the dataset made a checkpoint.

`loragen ckpt convert`: traditional experiments -> run directories.

`loragen ckpt`: know what the weights are.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from loragen.cli import render
from loragen.cli.options import Alpha, BaseModel, DataRoot, Force, Json
from loragen.core.analysis.report import Analysis, Comparison, ModuleReport, Report, by_tensor
from loragen.core.errors import DataError, UsageError

if TYPE_CHECKING:
    from loragen.core.analysis.tokenized import Tokenized
    from loragen.core.lora.provenance import TracedRun

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

    from loragen.core.analysis.series import analyze as analyze_paths

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


def test(
    file: Annotated[
        Path | None,
        typer.Argument(help="A .ckpt, .pt, .safetensors, a PEFT directory, or a run (its newest)."),
    ] = None,
    checkpoint_file: Annotated[Path | None, typer.Option(hidden=True)] = None,
    max_tokens: Annotated[
        str, typer.Option("--max-tokens", metavar="N|auto", help="As many as the layout may have.")
    ] = "auto",
    token_dim: Annotated[
        int, typer.Option("--token-dim", min=1, help="Values of one token.")
    ] = 384,
    json: Json = False,
) -> None:
    """Tokenise one adapter as a generator does: its layout, tokens, fill, and the round trip.

    Exits with 1 where it needs more than --max-tokens, or does not come back bit for bit.
    """
    path = _the_one(file, checkpoint_file)
    most = _most(max_tokens)
    if not path.exists():
        raise UsageError(f"{path}: no such checkpoint")

    from loragen.core.analysis.tokenized import tokenized

    report = tokenized(path, token_dim, most)
    if json:
        render.answer_json(report.as_dict())
    else:
        _show_tokens(report)
    if not report.fits:
        raise DataError(
            f"{report.file} does not fit: --max-tokens is {report.max_tokens} and it needs "
            f"{report.tokens} tokens of {token_dim} values: give {report.tokens} or auto"
        )
    if report.bits_changed:
        raise DataError(f"{report.file} does not come back unchanged from its tokens")


def _the_one(file: Path | None, option: Path | None) -> Path:
    if (file is None) == (option is None):
        raise UsageError("which checkpoint? Give one: loragen ckpt test FILE")
    path = file or option
    assert path is not None
    return path


def _most(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) == 0:
        raise UsageError(f"--max-tokens: a whole number above 0, or auto (got {text})")
    return int(text)


def _show_tokens(report: "Tokenized") -> None:
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
        f"{report.values:,} values in {report.tensors} tensors\n"
        f"{report.tokens:,} tokens of {report.token_dim}, {report.fill:.1%} filled\n"
        f"round trip: {exact} ({report.bits_changed} values changed, "
        f"largest error {report.largest_error:g})"
    )


def lines(
    path: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint of a run, or a run.")],
    step: Annotated[
        int | None, typer.Option("--step", min=1, help="Any step of the run, kept or not.")
    ] = None,
    json: Json = False,
) -> None:
    """The lines of the dataset that a checkpoint's own step was trained on.

    Computed from the run's seed: it needs no --track-batches, only the dataset as it was.
    """
    from loragen.core.lora.provenance import traced_run

    if not path.exists():
        raise UsageError(f"{path}: no such run or checkpoint; --step N knows steps without one")
    run = traced_run(path)
    step = step or _step_of(path)
    if step > run.done_steps:
        raise UsageError(f"{run.directory} has no step {step}: it has done {run.done_steps}")
    document = _batch(run, step)
    if json:
        render.answer_json(document)
        return
    render.answer(
        f"{document['file']}\nstep {step}, stage {document['stage']}, "
        f"learning rate {document['learning_rate']:g}\n"
    )
    rows = [tuple(row.values()) for row in document["rows"]]
    render.answer(render.columns(("line", "hash", "prompt"), rows))


def _batch(run: "TracedRun", step: int) -> dict[str, Any]:
    from loragen.core.lora.provenance import row_hash

    rate = run.rate(step)
    return {
        "run": str(run.directory),
        "file": run.manifest.dataset.path,
        "step": step,
        "stage": rate.stage,
        "learning_rate": rate.learning_rate,
        "rows": [
            {"line": row.line, "hash": row_hash(row), "prompt": render.one_line(row.prompt)}
            for row in run.provenance.rows_of(step)
        ],
    }


def _step_of(path: Path) -> int:
    """As the checkpoint's name tells; last.ckpt has it inside."""
    from loragen.core.run.directory import LAST_CHECKPOINT, checkpoint_step

    if path.is_file() and path.name == LAST_CHECKPOINT.name:
        from loragen.core.run.checkpoints import load_plain

        return int(load_plain(path)["global_step"])
    found = checkpoint_step(path) if path.is_file() else 0
    if not found:
        raise UsageError(f"{path}: which step? Name a checkpoint of the run, or give --step N")
    return found


def convert(
    sources: Annotated[
        list[Path],
        typer.Argument(help="Traditional runs, folders with many, or folders of checkpoints."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where run directories are made.")
    ] = Path("runs"),
    base_model: BaseModel = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            "--dataset", help="A name under --data-root, or a file; for a single dataset."
        ),
    ] = None,
    data_root: DataRoot = "data_to_lora/cs",
    alpha: Alpha = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="The training's own YAML: alpha, base, schedule, ..."),
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out checkpoints that are broken or differ.")
    ] = False,
    json: Json = False,
) -> None:
    """Turn traditional experiments into run directories that `gen train` learns from.

    Reads experiments/<name>/<dataset>/<run>/{models,checkpoints,logs}: .pt, .pth, .bin, .ckpt,
    .safetensors, PEFT and Trainer directories. Of a full model only the LoRA part is read. What was
    converted before is left as it is. Prints the run directories.
    """
    from loragen.core.files import refuse_file
    from loragen.legacy.discover import find_runs

    refuse_file(output)
    runs = [run for source in sources for run in find_runs(source)]

    from loragen.legacy.convert import ConversionOptions, check_one_dataset

    options = ConversionOptions(
        output, base_model, dataset, Path(data_root or "."), alpha, config, skip_bad
    )
    check_one_dataset(runs, options)
    documents = [
        _converted(run, options, f"[{i}/{len(runs)}]", alone=len(runs) == 1)
        for i, run in enumerate(runs, 1)
    ]
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
        raise typer.Exit(1)


def _converted(run: Any, options: Any, count: str, alone: bool) -> dict[str, Any]:
    """One run's conversion as a document; where there are others, its failure stops none."""
    from loragen.core.errors import LoragenError
    from loragen.legacy.convert import convert as convert_run

    source = str(run.source)
    render.note(f"{count} {source}")
    try:
        converted = convert_run(run, options)
    except LoragenError as error:
        if alone:
            raise
        render.problems(error.problems)
        return {"source": source, "run": None, "error": list(error.problems)}
    for line in _remarks(converted):
        render.note(f"  {line}")
    return {
        "source": source,
        "run": str(converted.directory),
        "error": None,
        "already": converted.already,
        "left_out": converted.left_out,
        "optimizer_states": converted.optimizer_states,
        "assumed": converted.assumed,
        **converted.manifest.model_dump(),
    }


def _remarks(converted: Any) -> list[str]:
    manifest = converted.manifest
    if converted.already:
        return [f"was converted before, to {converted.directory}; remove that to convert it again"]
    steps = manifest.steps
    rank, alpha = manifest.adapter_config["r"], manifest.adapter_config["lora_alpha"]
    lines = [
        f"{len(steps)} checkpoints, steps {steps[0]} to {steps[-1]}",
        f"rank {rank}, alpha {alpha:g}, base {manifest.base_model}",
    ]
    lines += [f"left out: {line}" for line in converted.left_out]
    if converted.optimizer_states < len(steps):
        lines.append(
            f"{converted.optimizer_states} of {len(steps)} have an optimizer state that fits; "
            "training on from the others starts the optimizer afresh"
        )
    if converted.assumed:
        lines.append(f"not recorded, defaults in config.yaml: {', '.join(converted.assumed)}")
    if not manifest.dataset.path:
        lines.append(
            f"dataset {manifest.dataset.name}: no file found (--dataset FILE, --data-root); "
            "`gen train` will want `prompts: FILE` for this run"
        )
    return lines


app = typer.Typer(no_args_is_help=True, help="Look into checkpoints, and convert old ones.")
for command in (analyze, test, lines, convert):
    app.command()(command)
