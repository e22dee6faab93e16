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
    Force,
    Json,
    Settings,
    SkipBadRows,
)
from loragen.core.data.documents import Source

app = typer.Typer(no_args_is_help=True, help="Train LoRA adapters, evaluate one, export it.")


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
    dry_run: DryRun = False,
    settings: Settings = None,
    json: Json = False,
) -> None:
    """Train one LoRA adapter per dataset, in two stages, and keep the checkpoints of stage 2.

    Runs on defaults with nothing but --dataset. Prints the run directory of each dataset.
    """
    from loragen.core.config import LoraTrainConfig, Override, dump, load
    from loragen.core.data.rows import find_dataset
    from loragen.core.runs import CONFIG, LoraManifest, read_manifest, run_directory_of

    given = [
        (("base_model",), base_model, "--base-model"),
        (("data", "root"), data_root, "--data-root"),
        (("data", "skip_bad_rows"), skip_bad_rows or None, "--skip-bad-rows"),
        (("training", "batch_size"), batch_size, "--batch-size"),
        (("runs_dir",), str(runs_dir) if runs_dir else None, "--runs-dir"),
        (("track_batches",), track_batches or None, "--track-batches"),
    ]
    if resume:
        directory = run_directory_of(resume)
        manifest = read_manifest(directory, LoraManifest)
        config = config or directory / CONFIG
        if not load(LoraTrainConfig, directory / CONFIG, environment={}).trainer.sets_base_dtype:
            given.append((("base_dtype",), manifest.base_dtype or None, "the run's manifest"))
        dataset = dataset or [manifest.dataset.path]
    flags = [Override(*one) for one in given if one[1] is not None]
    resolved = load(LoraTrainConfig, config, settings or (), flags)
    if test_mode:
        _shorten(resolved)
    wanted = dataset or ([resolved.data.dataset] if resolved.data.dataset else [])
    datasets = [find_dataset(item, Path(resolved.data.root)) for item in _required(wanted)]
    if len(wanted) == 1 and not resume:
        resolved.data.dataset = wanted[0]
    if dry_run:
        _check_inputs(resolved, datasets)
        render.answer(dump(resolved).rstrip())
        return
    runs = _resume(resolved, datasets, resume) if resume else _collect(resolved, wanted, datasets)
    if json:
        render.answer_json(
            [{"run": str(run.directory), **run.manifest.model_dump()} for run in runs]
        )
    else:
        for run in runs:
            render.answer(str(run.directory))


def _resume(config: Any, datasets: list[tuple[str, Source]], path: Path) -> list[Any]:
    """Goes on with the run at `path`."""
    from loragen.cli.progress import terminal_progress
    from loragen.core.errors import UsageError
    from loragen.core.lora.precision import load_training_base
    from loragen.core.lora.resume import find_resume_point
    from loragen.core.lora.train import train

    if len(datasets) > 1:
        raise UsageError("--resume goes on with one run, and so with one dataset")
    point = find_resume_point(path)
    found = point.checkpoint.name if point.checkpoint else "no checkpoint"
    done = point.step == config.training.max_steps
    then = "all steps are done" if done else f"the next step is {point.step + 1}"
    render.note(f"{point.directory}: found {found}; {then}")
    base = load_training_base(config)
    ((_, file),) = datasets
    return [train(config, point.manifest.dataset.name, file, base, terminal_progress(), point)]


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
    from loragen.core.lora.precision import load_training_base
    from loragen.core.lora.train import train

    base = load_training_base(config)
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
