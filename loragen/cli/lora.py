"""`loragen lora`: collect adapters, and measure one."""

from pathlib import Path
from typing import Annotated, Any

import typer

from loragen.cli import render
from loragen.cli.options import BaseModel, ConfigFile, DataRoot, DryRun, Force, Json, Settings

app = typer.Typer(no_args_is_help=True, help="Train LoRA adapters, evaluate one, export it.")


@app.command()
def train(
    dataset: Annotated[
        list[str] | None,
        typer.Option("--dataset", help="A name under --data-root, or a file. Repeatable."),
    ] = None,
    config: ConfigFile = None,
    base_model: BaseModel = None,
    data_root: DataRoot = None,
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


def _check_inputs(config: Any, datasets: list[tuple[str, Path]]) -> None:
    """Everything that can be wrong before training, without a model in memory."""
    from loragen.core.base_models import resolve_base
    from loragen.core.data.rows import read_rows

    resolve_base(config.base_model)
    for name, file in datasets:
        render.note(f"{name}: {len(read_rows(file))} rows in {file}")


def _collect(config: Any, items: list[str], datasets: list[tuple[str, Path]]) -> list[Any]:
    """A run per dataset, on one base model; `items` are the datasets as the user named them."""
    from loragen.cli.progress import terminal_progress
    from loragen.core.data.rows import read_rows

    # A bad row of the last dataset is better known before the first has trained.
    for _, file in datasets:
        read_rows(file)
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
        str, typer.Option("--dataset", help="A name under --data-root (its test split), or a file.")
    ],
    adapter: Annotated[
        Path | None, typer.Option("--adapter", help="A PEFT directory, a run, or a .ckpt of a run.")
    ] = None,
    no_adapter: Annotated[
        bool, typer.Option("--no-adapter", help="The base model as it is.")
    ] = False,
    base_model: BaseModel = None,
    data_root: DataRoot = "data_to_lora/cs",
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
    rows = read_rows(file)[:limit]

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


@app.command()
def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="A run, a .ckpt of one, a PEFT directory, or any file with LoRA in it."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", help="The directory that is written.")],
    merge: Annotated[
        bool, typer.Option("--merge", help="A whole Hugging Face model instead of an adapter.")
    ] = False,
    base_model: BaseModel = None,
    alpha: Annotated[
        float | None, typer.Option("--alpha", min=0, help="LoRA's alpha, where nothing records it.")
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write an adapter, or the model it makes of its base, for use without loragen.

    The adapter loads with `peft.PeftModel.from_pretrained(base, DIR)`, the merged model, in the
    base's own dtype and with its tokenizer, with `AutoModelForCausalLM.from_pretrained(DIR)`.
    """
    from loragen.core.files import refuse_existing
    from loragen.core.runs import ADAPTER_CONFIG, MERGED_MARKER

    refuse_existing(output, force, marker=MERGED_MARKER if merge else ADAPTER_CONFIG)

    from loragen.core.lora.export import export_adapter, export_merged, exported_adapter

    adapter = exported_adapter(checkpoint, base_model, alpha)
    (export_merged if merge else export_adapter)(adapter, checkpoint, output)
    if json:
        render.answer_json(
            {
                "output": str(output),
                "kind": "merged" if merge else "adapter",
                "base_model": adapter.config["base_model_name_or_path"],
                "checkpoint": str(checkpoint),
            }
        )
    else:
        render.answer(str(output))
