"""`loragen demo`: the whole pipeline in a few minutes, on a laptop, without network."""

from pathlib import Path
from typing import Annotated

import typer

from loragen.cli import options, render


def run_demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The directory for all files of the demo.")
    ] = Path("demo-out"),
    seed: Annotated[
        int,
        typer.Option(
            "--seed",
            min=0,
            max=2**32 - 1,
            help="Seed of the held-out pairs and of every initialisation.",
        ),
    ] = 0,
    world: Annotated[
        Path | None,
        typer.Option("--world", help="A YAML file of wordings, instead of the built-in ones."),
    ] = None,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Collect adapters, train a generator, and evaluate what it generates, in a made-up world.

    A tiny base model knows facts about 96 creatures, but not which of them a question asks for:
    that information can only come through an adapter. Adapters are trained for 32 tasks; for other
    tasks they are generated from 16 unlabelled prompts each.
    """
    from loragen.cli.gen import print_results
    from loragen.cli.progress import terminal_progress
    from loragen.demo.workers import worker_pool
    from loragen.demo.world import prepare_demo

    prepared = prepare_demo(output, seed, world, force)
    try:
        with worker_pool() as workers:
            from loragen.demo.run import demo_results  # takes seconds: the workers start meanwhile

            results = demo_results(prepared, workers, terminal_progress())
    finally:
        prepared.record()
    if json:
        render.answer_json(results)
        return
    print_results(results)
    held_out = ", ".join("-".join(pair) for pair in results["held_out"])
    render.answer(f"held out (seed {seed}): {held_out}")
    render.answer(f"in all {results['seconds']['total']:.0f} s")
    render.answer("\n".join(str(output / f"results.{kind}") for kind in ("json", "md", "png")))
