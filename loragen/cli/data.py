"""`loragen data prepare`: a dataset's prompts, joined and split, for a generator to learn from.

`loragen data uses`: what a run did with one row.

`loragen data`: look at a dataset before anything is trained on it, and prepare its prompts.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loragen.cli import render
from loragen.cli.options import BaseModel, DataRoot, Force, Json, SkipBadRows
from loragen.core.errors import UsageError

if TYPE_CHECKING:
    from loragen.core.data.prepare import PreparedDataset
    from loragen.core.data.rows import Row
    from loragen.core.data.tokenize import Preview, PreviewedRow
    from loragen.core.lora.provenance import TracedRun


def prepare(
    source: Annotated[
        list[str],
        typer.Option(
            "--source",
            help="A file of rows or prompts, a name under --data-root, or hub:owner/name. "
            "Repeatable: a dataset each.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where the two files go, and prepared.json.")
    ],
    samples_per_prompt: Annotated[
        int, typer.Option("--samples-per-prompt", min=1, help="Rows joined into one prompt text.")
    ] = 4,
    test_ratio: Annotated[
        float,
        typer.Option("--test-ratio", min=0, max=0.99, help="Share of the texts held out for val/."),
    ] = 0.1,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the grouping and the split.")] = 42,
    data_root: DataRoot = "data_to_lora/cs",
    skip_bad_rows: SkipBadRows = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Join the prompts of datasets into texts, at random, and hold some out.

    Writes train_prompts.jsonl and val_prompts.jsonl, for `gen train --prompts DIR`. Labels are not
    read. No row is in two texts, and a prompt that comes twice counts once; the last few that are
    too few for a text are left out.
    """
    from loragen.core.data.prepare import Grouping
    from loragen.core.data.prepare import prepare as write
    from loragen.core.data.rows import find_dataset

    found = [find_dataset(one, Path(data_root or ".")) for one in source]
    grouping = Grouping(samples_per_prompt=samples_per_prompt, test_ratio=test_ratio, seed=seed)
    record = write(found, output, grouping, skip_bad_rows, force)
    if json:
        render.answer_json({"output_dir": str(output), **record.model_dump()})
    else:
        render.answer(_table(record.datasets))


def _table(datasets: "list[PreparedDataset]") -> str:
    header = ("dataset", "prompts", "repeated", "left over", "train texts", "val texts")
    rows = [(d.dataset, d.prompts, d.repeated, d.left_over, d.train, d.val) for d in datasets]
    return render.columns(header, rows)


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
    from loragen.core.run.directory import checkpoint_files, checkpoint_step

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


app = typer.Typer(no_args_is_help=True, help="Look at a dataset, and prepare its prompts.")

MOST_BAD_ROWS = 10
LONGEST_CUT = 200  # characters shown of what is cut

for command in (prepare, uses):
    app.command()(command)


@app.command()
def preview(
    source: Annotated[
        str,
        typer.Argument(
            help="A file (.jsonl, .json, .csv, .parquet), a name under --data-root, or "
            r"hub:owner/name[:config]\[@split]."  # unescaped, @split would be markup
        ),
    ],
    base_model: BaseModel = None,
    data_root: DataRoot = "data_to_lora/cs",
    limit: Annotated[int, typer.Option("--limit", min=0, help="How many rows to show.")] = 3,
    max_length: Annotated[
        int | None, typer.Option("--max-length", min=8, help="As data.max_length of lora train.")
    ] = None,
    skip_bad_rows: SkipBadRows = False,
    json: Json = False,
) -> None:
    """Rows as the model would see them: what is learned, what is given, what is cut.

    Counts rows, bad rows and tokens. The base's tokenizer is enough. Exits with 1 where there are
    bad rows that lora train would refuse.
    """
    from loragen.core.config import LoraTrainConfig
    from loragen.core.data.rows import find_dataset, read
    from loragen.core.errors import EXIT_FAILED

    defaults = LoraTrainConfig()
    reading = read(find_dataset(source, Path(data_root or "."))[1])

    from loragen.core.base.load import load_tokenizer
    from loragen.core.data.tokenize import preview as look

    tokenizer = load_tokenizer(base_model or defaults.base_model)
    found = look(tokenizer, reading, max_length or defaults.data.max_length, limit)
    if json:
        render.answer_json(found.as_dict())
    else:
        render.answer("\n\n".join([_numbers(found), *map(_sample, found.samples)]))
    if found.bad_rows and not skip_bad_rows:
        count = "a bad row" if len(found.bad_rows) == 1 else f"{len(found.bad_rows)} bad rows"
        render.problems([f"{found.source}: {count} (--skip-bad-rows leaves out what is bad)"])
        raise typer.Exit(EXIT_FAILED)


def _numbers(found: "Preview") -> str:
    formats = found.formats.items()
    several = len(formats) > 1
    format_names = (f"{name} ({count})" if several else name for name, count in formats)
    cut = f"{found.rows_cut} rows, {found.tokens_cut} tokens of their prompts' starts"
    lines = [
        found.source,
        f"format         {', '.join(format_names)}",
        f"rows           {found.rows}",
        f"cut            {cut if found.rows_cut else 'none'} (max_length {found.max_length})",
        f"shared prefix  {found.shared_prefix} tokens",
        f"bad rows       {len(found.bad_rows)}",
        *(f"  line {line}: {reason}" for line, reason in found.bad_rows[:MOST_BAD_ROWS]),
    ]
    if len(found.bad_rows) > MOST_BAD_ROWS:
        lines.append(f"  and {len(found.bad_rows) - MOST_BAD_ROWS} more")
    kinds = {"rows": found.row_tokens, "answers": found.answer_tokens}
    table = [(kind, of.p5, of.p50, of.p95, of.max) for kind, of in kinds.items()]
    lines += ["", render.columns(("tokens of", "p5", "p50", "p95", "max"), table)]
    if found.samples:
        shown = render.highlighted("learned", "good"), render.highlighted("cut", "dropped")
        lines += ["", f"{len(found.samples)} of {found.rows} rows, {shown[0]} and {shown[1]}:"]
    return "\n".join(lines)


def _sample(sample: "PreviewedRow") -> str:
    cut = sample.cut if len(sample.cut) <= LONGEST_CUT else f"…{sample.cut[-LONGEST_CUT:]}"
    parts = [
        render.highlighted(cut, "dropped") if cut else "",
        render.visible(sample.prompt),
        render.highlighted(sample.answer, "good"),
    ]
    return f"line {sample.line}\n{''.join(parts)}"
