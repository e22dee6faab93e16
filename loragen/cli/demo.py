"""`loragen demo`: the whole path in a few minutes, on a laptop, without network."""

from pathlib import Path
from typing import Annotated

import typer

from loragen.cli import render
from loragen.cli.options import Force, Json


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Everything is written below it.")
    ] = Path("demo-out"),
    seed: Annotated[
        int,
        typer.Option("--seed", min=0, help="Moves the held-out pairs and every initialisation."),
    ] = 0,
    world: Annotated[
        Path | None,
        typer.Option(
            "--world", help="A YAML file with your own wordings, in place of the shipped."
        ),
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Collect adapters, train a generator, and judge what it generates, in a made-up world.

    A tiny base model knows facts about 96 creatures, but its question's words tell it nothing: what
    is asked can only arrive through an adapter. 32 tasks are collected; adapters for others are
    generated from 16 unlabelled prompts each.
    """
    from loragen.cli.gen import answer_results
    from loragen.cli.progress import terminal_progress
    from loragen.demo.data import begin
    from loragen.demo.workers import Workers

    begun = begin(output, seed, world, force, render.note, terminal_progress())
    with Workers() as workers:
        from loragen.demo.run import run  # takes seconds, as the workers' start does

        results = run(begun, workers)
    if json:
        render.answer_json(results)
        return
    answer_results(results)
    held_out = ", ".join("-".join(pair) for pair in results["held_out"])
    render.answer(f"held out (seed {seed}): {held_out}")
    render.answer(f"in all {results['seconds']['total']:.0f} s")
    render.answer("\n".join(str(output / f"results.{kind}") for kind in ("json", "md", "png")))
