"""`loragen data uses`: what a run did with one row."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loragen.cli import render
from loragen.cli.options import Json
from loragen.core.errors import UsageError

if TYPE_CHECKING:
    from loragen.core.data.rows import Row
    from loragen.core.lora.provenance import TracedRun


def uses(
    place: Annotated[
        str, typer.Argument(metavar="FILE:LINE", help="A row: train.jsonl:12. Lines count from 1.")
    ],
    run: Annotated[Path, typer.Option("--run", help="A run directory, or a checkpoint of it.")],
    json: Json = False,
) -> None:
    """At which steps a run was trained on a row, and which checkpoints' own steps had it.

    Computed from the run's seed: it needs no --track-batches. FILE may be a copy of the run's data
    anywhere.
    """
    from loragen.core.lora.provenance import traced_run

    file, line = file_and_line(place)
    traced = traced_run(run, file)
    row = traced.row_at(line)
    if row is None:
        raise UsageError(f"{file}:{line}: no row; the file has {traced.manifest.dataset.rows} rows")
    document = {"file": str(file), "line": line, "run": str(traced.directory), **_uses(traced, row)}
    if json:
        render.answer_json(document)
    else:
        _show(document)


def file_and_line(place: str) -> tuple[Path, int]:
    """`train.jsonl:12`; the colon of a drive letter is no border."""
    file, _, line = place.rpartition(":")
    if not file or not (line.isascii() and line.isdigit()) or int(line) == 0:
        raise UsageError(f"{place}: expected FILE:LINE, as in train.jsonl:12")
    return Path(file), int(line)


def _uses(run: "TracedRun", row: "Row") -> dict[str, Any]:
    from loragen.core.lora.provenance import row_hash
    from loragen.core.runs import checkpoint_files, checkpoint_step

    steps = run.steps_of(row.line)
    files = {checkpoint_step(file): file.name for file in checkpoint_files(run.directory)}
    return {
        "hash": row_hash(row),
        "prompt": render.one_line(row.prompt),
        "held_out": row in run.held_out,
        "steps": [{"step": step, "stage": run.rate(step).stage} for step in steps],
        "checkpoints": [files[step] for step in steps if step in files],
        "done_steps": run.done_steps,
        "planned_steps": run.planned_steps,
    }


def _show(document: dict[str, Any]) -> None:
    render.answer("{file}:{line} ({hash})  {prompt}".format(**document))
    if document["held_out"]:
        render.answer("held out for validation: the run was never trained on it")
        return
    done = "{done_steps} of {planned_steps} steps done".format(**document)
    steps = document["steps"]
    if not steps:
        render.answer(f"not trained on so far ({done})")
        return
    for stage in dict.fromkeys(use["stage"] for use in steps):
        of_stage = [str(use["step"]) for use in steps if use["stage"] == stage]
        word = "step" if len(of_stage) == 1 else "steps"
        render.answer(f"stage {stage}: {word} {', '.join(of_stage)}")
    render.answer(f"checkpoints of these steps: {', '.join(document['checkpoints']) or 'none'}")
    render.answer(f"({done})")
