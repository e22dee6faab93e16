"""`loragen demo`: the whole path in a few minutes, on a laptop, without network."""

from pathlib import Path
from typing import Annotated, Any

import typer

from loragen.cli import render
from loragen.cli.options import Force, Json


def demo(
    out: Annotated[Path, typer.Option("--out", help="Everything is written below it.")] = Path(
        "demo-out"
    ),
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
    from loragen.cli.progress import terminal_progress
    from loragen.demo.picture import draw
    from loragen.demo.run import run

    results = run(out, seed, world, force, render.note, terminal_progress())
    draw(results, out / "results.png")
    if json:
        render.answer_json(results)
    else:
        render.answer(_table(results))
        render.answer(f"\n{out / 'results.json'}\n{out / 'results.png'}")


def _table(results: dict[str, Any]) -> str:
    accuracy, seconds = results["accuracy"], results["seconds"]
    columns = next(iter(accuracy.values()))
    rows = [
        (split.replace("_", " "), *(f"{of[column]:.2f}" for column in columns))
        for split, of in accuracy.items()
    ]
    header = ("split", *(column.replace("_", " ") for column in columns))
    held_out = ", ".join("-".join(pair) for pair in results["held_out"])
    return (
        f"{render.columns(header, rows)}\n\n"
        f"an adapter: {seconds['train_adapter']:.1f} s to train, "
        f"{seconds['generate_adapter']:.3f} s to generate; in all {seconds['total']:.0f} s\n"
        f"held out (seed {results['seed']}): {held_out}"
    )
