"""`loragen gen eval`: does the generated adapter beat the alternatives?"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from loragen.cli import render
from loragen.cli.options import BaseModel, DataRoot, Force, Json, SkipBadRows


def evaluate(
    model: Annotated[
        Path, typer.Option("--model", help="An experiment, its generator_model.pt or a checkpoint.")
    ],
    dataset: Annotated[
        list[str],
        typer.Option(
            "--dataset",
            help="A name under --data-root (its test split), a file or hub:owner/name. Repeatable.",
        ),
    ],
    data_root: DataRoot = "data_to_lora/cs",
    base_model: BaseModel = None,
    columns: Annotated[
        str | None, typer.Option("--columns", help="Only these, with commas: base,generated,...")
    ] = None,
    multi_task: Annotated[
        bool,
        typer.Option("--multi-task", help="Also one LoRA trained on all training datasets."),
    ] = False,
    oracle: Annotated[
        bool, typer.Option("--oracle", help="Also a LoRA trained on each dataset's own labels.")
    ] = False,
    draws: Annotated[
        int, typer.Option("--draws", min=2, help="Generations a dataset, each of other prompts.")
    ] = 5,
    prompts: Annotated[
        int | None,
        typer.Option("--prompts", min=1, help="Prompts a draw; else as many as in training."),
    ] = None,
    shots: Annotated[
        int, typer.Option("--shots", min=1, help="Labelled rows of the few_shot column.")
    ] = 4,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Only the first rows of each dataset.")
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Of the draws of prompts and of shots.")
    ] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 32,
    skip_bad_rows: SkipBadRows = False,
    cache_dir: Annotated[
        Path, typer.Option("--cache-dir", help="Keeps what is trained here for the next time.")
    ] = Path(".loragen-cache"),
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A directory for results.json, .md and .png."),
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Put generated adapters beside everything simpler, on any datasets.

    The columns: base, mean_adapter, nearest_adapter, few_shot, random_prompts, generated; and on
    demand multi_task and oracle, which are trained once and kept. See docs/evaluating.md.
    """
    from loragen.cli.progress import terminal_progress
    from loragen.core.evaluation.columns import MULTI_TASK, ORACLE, chosen
    from loragen.core.evaluation.targets import check_oracles, find_targets
    from loragen.core.files import refuse_existing, refuse_file
    from loragen.core.runs import experiment_name, generator_file

    also = [name for name, on in ((MULTI_TASK, multi_task), (ORACLE, oracle)) if on]
    wanted = chosen((columns or "").split(","), also)
    file = generator_file(model)
    if output:
        refuse_file(output)
        refuse_existing(output, force, marker="results.json")
    targets = find_targets(dataset, Path(data_root or "."), limit, skip_bad_rows)
    if any(column.name == ORACLE for column in wanted):
        check_oracles(targets)

    from loragen.core.evaluation.bench import Options
    from loragen.core.evaluation.report import write
    from loragen.core.evaluation.run import evaluate_generator

    results = evaluate_generator(
        file,
        targets,
        wanted,
        options=Options(draws, prompts, shots, seed, batch_size),
        base_model=base_model,
        cache=cache_dir,
        progress=terminal_progress(),
        strict=columns is not None,
    )
    if output:
        write(results, f"Does {experiment_name(file)} beat the rest?", output)
    if json:
        render.answer_json(results)
    else:
        answer_results(results)


def answer_results(results: Mapping[str, Any]) -> None:
    """The tables, and what may be said of them."""
    from loragen.core.evaluation.report import remarks, tables

    for table in tables(results):
        render.answer(render.columns(table.header, table.rows) + "\n")
    render.answer("\n".join(remarks(results)))
