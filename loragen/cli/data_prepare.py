"""`loragen data prepare`: a dataset's prompts, joined and split, for a generator to learn from."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loragen.cli import render
from loragen.cli.options import DataRoot, Force, Json, SkipBadRows

if TYPE_CHECKING:
    from loragen.core.data.prepare import DatasetRecord


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


def _table(datasets: "list[DatasetRecord]") -> str:
    header = ("dataset", "prompts", "repeated", "left over", "train texts", "val texts")
    rows = [(d.dataset, d.prompts, d.repeated, d.left_over, d.train, d.val) for d in datasets]
    return render.columns(header, rows)
