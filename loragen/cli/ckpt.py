"""`loragen ckpt`: know what the weights are."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loragen.cli import render
from loragen.cli.options import Alpha, BaseModel, DataRoot, Json
from loragen.core.errors import UsageError

if TYPE_CHECKING:
    from loragen.core.lora.provenance import TracedRun

app = typer.Typer(no_args_is_help=True, help="Look into checkpoints, and convert old ones.")

MOST_ROWS = 12


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


@app.command()
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
    from loragen.core.runs import LAST_CHECKPOINT, checkpoint_step

    if path.is_file() and path.name == LAST_CHECKPOINT.name:
        from loragen.core.checkpoints import load_plain

        return int(load_plain(path)["global_step"])
    found = checkpoint_step(path) if path.is_file() else 0
    if not found:
        raise UsageError(f"{path}: which step? Name a checkpoint of the run, or give --step N")
    return found


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


@app.command()
def convert(
    sources: Annotated[
        list[Path],
        typer.Argument(help="Traditional runs, folders with many, or folders of checkpoints."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "--output-dir", help="Where run directories are made.")
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
    from loragen.core.conversion.discover import find_runs
    from loragen.core.files import refuse_file

    refuse_file(output)
    runs = [run for source in sources for run in find_runs(source)]

    from loragen.core.conversion.convert import Options, check_one_dataset

    options = Options(output, base_model, dataset, Path(data_root or "."), alpha, config, skip_bad)
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
    from loragen.core.conversion.convert import convert as convert_run
    from loragen.core.errors import LoragenError

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
