"""`loragen data`: look at a dataset before anything is trained on it, and prepare its prompts."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loragen.cli import render
from loragen.cli.data_prepare import prepare
from loragen.cli.options import BaseModel, DataRoot, Json, SkipBadRows
from loragen.cli.uses import uses

if TYPE_CHECKING:
    from loragen.core.data.preview import Preview, Sample

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

    from loragen.core.base_models import load_tokenizer
    from loragen.core.data.preview import preview as look

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


def _sample(sample: "Sample") -> str:
    cut = sample.cut if len(sample.cut) <= LONGEST_CUT else f"…{sample.cut[-LONGEST_CUT:]}"
    parts = [
        render.highlighted(cut, "dropped") if cut else "",
        render.visible(sample.prompt),
        render.highlighted(sample.answer, "good"),
    ]
    return f"line {sample.line}\n{''.join(parts)}"
