"""`loragen gen train`: learn a generator from collected adapters."""

from typing import Annotated

import typer

from loragen.cli import render
from loragen.cli.options import ConfigFile, DryRun, Json, Settings


def train(
    config: ConfigFile = None,
    checkpoint_dir: Annotated[
        list[str] | None,
        typer.Option(
            "--checkpoint-dir",
            help="A run of lora train (or its checkpoints/), or a folder of runs. Repeatable.",
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts", help="A directory of data prepare; else the runs' own datasets are read."
        ),
    ] = None,
    dry_run: DryRun = False,
    settings: Settings = None,
    json: Json = False,
) -> None:
    """Train a generator on collected adapters and the prompts of their datasets.

    Prints the experiment directory; the generator is results/final_model/generator_model.pt.
    """
    from loragen.core.config import GenTrainConfig, Override, dump, load
    from loragen.core.generator.places import check_places

    given = [
        (("data", "checkpoint_dir"), checkpoint_dir or None, "--checkpoint-dir"),
        (("data", "prompts"), prompts, "--prompts"),
    ]
    flags = [Override(*one) for one in given if one[1] is not None]
    resolved = load(GenTrainConfig, config, settings or (), flags, early=check_places)

    from loragen.core.generator.train import plan
    from loragen.core.generator.train import train as train_generator

    if dry_run:
        render.note(plan(resolved).summary())
        render.answer(dump(resolved).rstrip())
        return
    from loragen.cli.progress import terminal_progress

    run = train_generator(resolved, terminal_progress())
    if json:
        render.answer_json({"run": str(run.directory), **run.manifest.model_dump()})
    else:
        render.answer(str(run.directory))
