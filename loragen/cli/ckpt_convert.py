"""`loragen ckpt convert`: traditional experiments -> run directories."""

from pathlib import Path
from typing import Annotated, Any

import typer

from loragen.cli import render
from loragen.cli.options import Alpha, BaseModel, DataRoot, Json


def convert(
    sources: Annotated[
        list[Path],
        typer.Argument(help="Traditional runs, folders with many, or folders of checkpoints."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where run directories are made.")
    ] = Path("runs"),
    base_model: BaseModel = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            "--dataset", help="A name under --data-root, or a file; for a single dataset."
        ),
    ] = None,
    data_root: DataRoot = "data_to_lora/cs",
    alpha: Alpha = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="The training's own YAML: alpha, base, schedule, ..."),
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out checkpoints that are broken or differ.")
    ] = False,
    json: Json = False,
) -> None:
    """Turn traditional experiments into run directories that `gen train` learns from.

    Reads experiments/<name>/<dataset>/<run>/{models,checkpoints,logs}: .pt, .pth, .bin, .ckpt,
    .safetensors, PEFT and Trainer directories. Of a full model only the LoRA part is read. What was
    converted before is left as it is. Prints the run directories.
    """
    from loragen.core.conversion.discover import find_runs
    from loragen.core.files import refuse_file

    refuse_file(output)
    runs = [run for source in sources for run in find_runs(source)]

    from loragen.core.conversion.convert import Options, check_one_dataset

    options = Options(output, base_model, dataset, Path(data_root or "."), alpha, config, skip_bad)
    check_one_dataset(runs, options)
    documents = [
        _converted(run, options, f"[{i}/{len(runs)}]", alone=len(runs) == 1)
        for i, run in enumerate(runs, 1)
    ]
    if json:
        render.answer_json(documents)
    else:
        for document in documents:
            if document["run"]:
                render.answer(document["run"])
    failed = [document for document in documents if document["error"]]
    if failed:
        render.note(f"{len(failed)} of {len(runs)} runs were not converted:")
        for document in failed:
            render.note(f"  {document['source']}")
        raise typer.Exit(1)


def _converted(run: Any, options: Any, count: str, alone: bool) -> dict[str, Any]:
    """One run's conversion as a document; where there are others, its failure stops none."""
    from loragen.core.conversion.convert import convert as convert_run
    from loragen.core.errors import LoragenError

    source = str(run.source)
    render.note(f"{count} {source}")
    try:
        converted = convert_run(run, options)
    except LoragenError as error:
        if alone:
            raise
        render.problems(error.problems)
        return {"source": source, "run": None, "error": list(error.problems)}
    for line in _remarks(converted):
        render.note(f"  {line}")
    return {
        "source": source,
        "run": str(converted.directory),
        "error": None,
        "already": converted.already,
        "left_out": converted.left_out,
        "optimizer_states": converted.optimizer_states,
        "assumed": converted.assumed,
        **converted.manifest.model_dump(),
    }


def _remarks(converted: Any) -> list[str]:
    manifest = converted.manifest
    if converted.already:
        return [f"was converted before, to {converted.directory}; remove that to convert it again"]
    steps = manifest.steps
    rank, alpha = manifest.adapter_config["r"], manifest.adapter_config["lora_alpha"]
    lines = [
        f"{len(steps)} checkpoints, steps {steps[0]} to {steps[-1]}",
        f"rank {rank}, alpha {alpha:g}, base {manifest.base_model}",
    ]
    lines += [f"left out: {line}" for line in converted.left_out]
    if converted.optimizer_states < len(steps):
        lines.append(
            f"{converted.optimizer_states} of {len(steps)} have an optimizer state that fits; "
            "training on from the others starts the optimizer afresh"
        )
    if converted.assumed:
        lines.append(f"not recorded, defaults in config.yaml: {', '.join(converted.assumed)}")
    if not manifest.dataset.path:
        lines.append(
            f"dataset {manifest.dataset.name}: no file found (--dataset FILE, --data-root); "
            "`gen train` will want `prompts: FILE` for this run"
        )
    return lines
