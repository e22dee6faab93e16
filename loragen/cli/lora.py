"""`loragen lora`: collect adapters, and measure one."""

from pathlib import Path
from typing import Annotated

import typer

from loragen.cli import render
from loragen.cli.options import (
    Alpha,
    BaseModel,
    ConfigFile,
    DataRoot,
    DryRun,
    Force,
    Json,
    Settings,
    SkipBadRows,
)

app = typer.Typer(no_args_is_help=True, help="Train LoRA adapters, evaluate one, export it.")


@app.command()
def train(
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            "--dataset", help="A name under --data-root, a file, or hub:owner/name. Repeatable."
        ),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every dataset below --data-root.")] = False,
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
    track_batches: Annotated[
        bool, typer.Option("--track-batches", help="Write which lines made which checkpoint.")
    ] = False,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume",
            "--resume-from-checkpoint",
            help="Go on with a run, from its newest checkpoint or the one named.",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Train again what is trained already.")
    ] = False,
    launcher: Annotated[
        str | None,
        typer.Option("--launcher", help="local, or ray: the datasets as tasks of a Ray cluster."),
    ] = None,
    dry_run: DryRun = False,
    settings: Settings = None,
    json: Json = False,
) -> None:
    """Train one LoRA adapter per dataset, in two stages, and keep the checkpoints of stage 2.

    Runs on defaults with nothing but --dataset. Prints the run directory of each dataset. What is
    trained already is not trained again, and a dataset that fails does not stop the others.
    """
    from loragen.cli import collect
    from loragen.core.config import Override

    given = [
        (("base_model",), base_model, "--base-model"),
        (("data", "root"), data_root, "--data-root"),
        (("data", "skip_bad_rows"), skip_bad_rows or None, "--skip-bad-rows"),
        (("training", "batch_size"), batch_size, "--batch-size"),
        (("runs_dir",), str(runs_dir) if runs_dir else None, "--runs-dir"),
        (("track_batches",), track_batches or None, "--track-batches"),
        (("launcher", "name"), launcher, "--launcher"),
    ]
    flags = [Override(*one) for one in given if one[1] is not None]
    source = collect.ConfigSource(config, settings or [], flags, test_mode)
    if resume:
        collect.go_on(source, resume, dataset or [], every, launcher, dry_run, json)
    elif dry_run:
        collect.dry_run(source, dataset or [], every, json)
    else:
        collect.train(source, dataset or [], every, force, json)


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
    if adapter and not adapter.exists():
        raise UsageError(f"{adapter}: no such adapter or checkpoint")
    name, file = find_dataset(dataset, Path(data_root or "."), split="test")
    rows = read_rows(file, skip_bad_rows)[:limit]

    from loragen.core.adapters import attach_adapter
    from loragen.core.base_models import load_base
    from loragen.core.checkpoints import read_checkpointed_adapter
    from loragen.core.devices import best_device
    from loragen.core.lora.evaluate import evaluate as score

    read = read_checkpointed_adapter(adapter) if adapter else None
    base_name = base_model or (read.config.get("base_model_name_or_path") if read else None)
    if not base_name:
        raise UsageError("which base model? Give --base-model")
    base = load_base(base_name)
    base.model.to(best_device())
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
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory that is written.")],
    merge: Annotated[
        bool, typer.Option("--merge", help="A whole Hugging Face model instead of an adapter.")
    ] = False,
    base_model: BaseModel = None,
    alpha: Alpha = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write an adapter, or the model it makes of its base, for use without loragen.

    The adapter loads with `peft.PeftModel.from_pretrained(base, DIR)`, the merged model, in the
    base's own dtype and with its tokenizer, with `AutoModelForCausalLM.from_pretrained(DIR)`.
    """
    from loragen.core.errors import UsageError
    from loragen.core.files import refuse_existing
    from loragen.core.runs import ADAPTER_CONFIG, MERGED_MARKER

    if not checkpoint.exists():
        raise UsageError(f"{checkpoint}: no such adapter or checkpoint")
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
