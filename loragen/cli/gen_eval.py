"""`loragen gen eval`: does the generated adapter beat the alternatives?"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loragen.cli import render
from loragen.cli.options import (
    BaseModel,
    DataRoot,
    Force,
    GeneratorPath,
    Json,
    SkipBadRows,
)

if TYPE_CHECKING:
    from loragen.core.evaluation.columns import Column
    from loragen.core.evaluation.targets import Target


Datasets = Annotated[
    list[str],
    typer.Option(
        "--dataset",
        help="A name under --data-root (its test split), a file or hub:owner/name. Repeatable.",
    ),
]
Columns = Annotated[
    str | None, typer.Option("--columns", help="Only these, with commas: base,generated,...")
]
MultiTask = Annotated[
    bool, typer.Option("--multi-task", help="Also one LoRA trained on all training datasets.")
]
Oracle = Annotated[
    bool, typer.Option("--oracle", help="Also a LoRA trained on each dataset's own labels.")
]
Draws = Annotated[
    int, typer.Option("--draws", min=2, help="Generations a dataset, each of other prompts.")
]
PromptsPerDraw = Annotated[
    int | None,
    typer.Option("--prompts", min=1, help="Prompts a draw; else as many as in training."),
]
Shots = Annotated[int, typer.Option("--shots", min=1, help="Labelled rows of the few_shot column.")]
Limit = Annotated[
    int | None, typer.Option("--limit", min=1, help="Only the first rows of each dataset.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of the draws of prompts and of shots.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1)]
CacheDir = Annotated[
    Path, typer.Option("--cache-dir", help="Keeps what is trained here for the next time.")
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="A directory for results.json, .md and .png."),
]


def evaluate(
    model: GeneratorPath,
    dataset: Datasets,
    data_root: DataRoot = "data_to_lora/cs",
    base_model: BaseModel = None,
    columns: Columns = None,
    multi_task: MultiTask = False,
    oracle: Oracle = False,
    draws: Draws = 5,
    prompts: PromptsPerDraw = None,
    shots: Shots = 4,
    limit: Limit = None,
    seed: Seed = 0,
    batch_size: BatchSize = 32,
    skip_bad_rows: SkipBadRows = False,
    cache_dir: CacheDir = Path(".loragen-cache"),
    output: Output = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Put generated adapters beside everything simpler, on any datasets.

    The columns: base, mean_adapter, nearest_adapter, few_shot, random_prompts, generated; and on
    demand multi_task and oracle, which are trained once and kept. See docs/evaluating.md.
    """
    from loragen.cli.progress import terminal_progress
    from loragen.core.evaluation.targets import find_targets
    from loragen.core.runs import generator_file

    wanted = _columns(columns, multi_task, oracle)
    file = generator_file(model)
    _make_sure_of(output, force)
    targets = find_targets(dataset, Path(data_root or "."), limit, skip_bad_rows)
    _check_oracles(wanted, targets)

    from loragen.core.evaluation.bench import Options
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
    _write(results, file, output)
    if json:
        render.answer_json(results)
    else:
        answer_results(results)


def _columns(given: str | None, multi_task: bool, oracle: bool) -> list["Column"]:
    from loragen.core.evaluation.columns import MULTI_TASK, ORACLE, chosen

    also = [name for name, on in ((MULTI_TASK, multi_task), (ORACLE, oracle)) if on]
    return chosen((given or "").split(","), also)


def _check_oracles(columns: Sequence["Column"], targets: Sequence["Target"]) -> None:
    """Raises UsageError where a dataset has no labels that an oracle could be trained on."""
    from loragen.core.evaluation.columns import ORACLE
    from loragen.core.evaluation.targets import check_oracles

    if any(column.name == ORACLE for column in columns):
        check_oracles(targets)


def _make_sure_of(output: Path | None, force: bool) -> None:
    """Raises UsageError where the results cannot be written."""
    from loragen.core.files import refuse_existing, refuse_file

    if output:
        refuse_file(output)
        refuse_existing(output, force, marker="results.json")


def _write(results: dict[str, Any], file: Path, output: Path | None) -> None:
    from loragen.core.evaluation.report import write
    from loragen.core.runs import experiment_name

    if output:
        write(results, f"Does {experiment_name(file)} beat the rest?", output)


def answer_results(results: Mapping[str, Any]) -> None:
    """The tables, and what may be said of them."""
    from loragen.core.evaluation.report import remarks, tables

    for table in tables(results):
        render.answer(render.columns(table.header, table.rows) + "\n")
    render.answer("\n".join(remarks(results)))
