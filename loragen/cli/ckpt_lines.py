"""`loragen ckpt lines`: which rows of the dataset made a checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loragen.cli import render
from loragen.cli.options import Json
from loragen.core.errors import UsageError

if TYPE_CHECKING:
    from loragen.core.lora.provenance import TracedRun


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
