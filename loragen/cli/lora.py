"""`loragen lora`: collect adapters, and measure one."""

from pathlib import Path
from typing import Annotated, Any

import typer

from loragen.cli import render
from loragen.cli.options import (
    BaseModel,
    ConfigFile,
    DataRoot,
    DryRun,
    Json,
    Settings,
    SkipBadRows,
)
from loragen.core.data.documents import Source

app = typer.Typer(no_args_is_help=True, help="Train LoRA adapters, and evaluate one.")


@app.command()
def train(
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            "--dataset", help="A name under --data-root, a file, or hub:owner/name. Repeatable."
        ),
    ] = None,
    config: ConfigFile = None,
    base_model: BaseModel = None,
    data_root: DataRoot = None,
    skip_bad_rows: SkipBadRows = False,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Rows per optimizer step.")
    ] = None,
    runs_dir: Annotated[
        Path | None, typer.Option("--runs-dir", help="Where run directories are made.")
    ] = None,
    test_mode: Annotated[
        bool, typer.Option("--test-mode", help="Six steps, three checkpoints: does it run?")
    ] = False,
    dry_run: DryRun = False,
    settings: Settings = None,
    json: Json = False,
) -> None:
    """Train one LoRA adapter per dataset, in two stages, and keep the checkpoints of stage 2.

    Runs on defaults with nothing but --dataset. Prints the run directory of each dataset.
    """
    from loragen.core.config import LoraTrainConfig, Override, dump, load
    from loragen.core.data.rows import find_dataset

    given = [
        (("base_model",), base_model, "--base-model"),
        (("data", "root"), data_root, "--data-root"),
        (("data", "skip_bad_rows"), skip_bad_rows or None, "--skip-bad-rows"),
        (("training", "batch_size"), batch_size, "--batch-size"),
        (("runs_dir",), str(runs_dir) if runs_dir else None, "--runs-dir"),
    ]
    flags = [Override(*one) for one in given if one[1] is not None]
    resolved = load(LoraTrainConfig, config, settings or (), flags)
    if test_mode:
        _shorten(resolved)
    wanted = dataset or ([resolved.data.dataset] if resolved.data.dataset else [])
    datasets = [find_dataset(item, Path(resolved.data.root)) for item in _required(wanted)]
    if len(wanted) == 1:
        resolved.data.dataset = wanted[0]
    if dry_run:
        _check_inputs(resolved, datasets)
        render.answer(dump(resolved).rstrip())
        return
    runs = _collect(resolved, wanted, datasets)
    if json:
        render.answer_json(
            [{"run": str(run.directory), **run.manifest.model_dump()} for run in runs]
        )
    else:
        for run in runs:
            render.answer(str(run.directory))


def _shorten(config: Any) -> None:
    """`--test-mode`: three steps of each stage, the checkpoints of the second."""
    config.training.max_steps = 6
    config.checkpoints.first_step = 4
    if "stage1_steps" in config.schedule.options:
        config.schedule = config.schedule.model_copy(update={"stage1_steps": 3})


def _required(datasets: list[str]) -> list[str]:
    from loragen.core.errors import UsageError

    if not datasets:
        raise UsageError("which dataset? Give --dataset NAME|FILE, or data.dataset in the YAML")
    return datasets


def _check_inputs(config: Any, datasets: list[tuple[str, Source]]) -> None:
    """Everything that can be wrong before training, without a model in memory."""
    from loragen.core.base_models import resolve_base
    from loragen.core.data.rows import read_rows

    resolve_base(config.base_model)
    for name, file in datasets:
        rows = read_rows(file, config.data.skip_bad_rows)
        render.note(f"{name}: {len(rows)} rows in {file}")


def _collect(config: Any, items: list[str], datasets: list[tuple[str, Source]]) -> list[Any]:
    """A run per dataset, on one base model; `items` are the datasets as the user named them."""
    from loragen.cli.progress import terminal_progress
    from loragen.core.data.rows import read, refuse_bad

    # A bad row of the last dataset is better known before the first has trained.
    for _, file in datasets:
        reading = read(file)
        refuse_bad(file, reading.bad, len(reading.rows), config.data.skip_bad_rows)
    from loragen.core.base_models import load_base
    from loragen.core.lora.train import base_dtype, train

    base = load_base(config.base_model, base_dtype(config))
    runs = []
    for item, (name, file) in zip(items, datasets, strict=True):
        resolved = config.model_copy(deep=True)
        resolved.data.dataset = item
        runs.append(train(resolved, name, file, base, terminal_progress()))
    return runs


@app.command("eval")
def evaluate(
    dataset: Annotated[
        str,
        typer.Option(
            "--dataset",
            help="A name under --data-root (its test split), a file, or hub:owner/name.",
        ),
    ],
    adapter: Annotated[
        Path | None, typer.Option("--adapter", help="A PEFT directory, a run, or a .ckpt of a run.")
    ] = None,
    no_adapter: Annotated[
        bool, typer.Option("--no-adapter", help="The base model as it is.")
    ] = False,
    base_model: BaseModel = None,
    data_root: DataRoot = "data_to_lora/cs",
    skip_bad_rows: SkipBadRows = False,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Only the first rows.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 32,
    json: Json = False,
) -> None:
    """Accuracy of an adapter, or of the base without one, on labelled rows.

    Exact match of the greedy answer; and choice accuracy by log-likelihood where rows carry
    choices or the dataset has a closed set of answers.
    """
    from loragen.core.data.rows import find_dataset, read_rows
    from loragen.core.errors import UsageError

    if (adapter is None) == (not no_adapter):
        raise UsageError("give either --adapter DIR|CKPT or --no-adapter")
    name, file = find_dataset(dataset, Path(data_root or "."), split="test")
    rows = read_rows(file, skip_bad_rows)[:limit]

    from loragen.core.adapters import attach_adapter
    from loragen.core.base_models import load_base
    from loragen.core.checkpoints import read_checkpointed_adapter
    from loragen.core.lora.evaluate import evaluate as score

    read = read_checkpointed_adapter(adapter) if adapter else None
    base_name = base_model or (read.config.get("base_model_name_or_path") if read else None)
    if not base_name:
        raise UsageError("which base model? Give --base-model")
    base = load_base(base_name)
    model = attach_adapter(base.model, read, str(adapter)) if read else base.model
    scores = score(model, base.tokenizer, rows, batch_size)
    document = {
        "dataset": name,
        "file": str(file),
        "base_model": base_name,
        "adapter": str(adapter) if adapter else None,
        **scores.as_dict(),
    }
    if json:
        render.answer_json(document)
    else:
        render.answer(render.columns(("measure", "value"), list(document.items())))
