"""`loragen gen infer`: prompts -> adapters."""

from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loragen.cli import render
from loragen.cli.options import BaseModel, Force, Json

if TYPE_CHECKING:
    from loragen.core.generator.inference.infer import Generated

MOST_WARNINGS = 3


class Format(StrEnum):
    peft = "peft"
    safetensors = "safetensors"
    pt = "pt"


def infer(
    model: Annotated[
        Path, typer.Option("--model", help="An experiment, its generator_model.pt or a checkpoint.")
    ],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="A prompt of the dataset. Repeatable.")
    ] = None,
    prompt_file: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt-file",
            help="Prompts: .txt (one a line), or rows or hub:owner/name as for lora train. "
            "Repeatable.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="A directory (PEFT), or a .safetensors or .pt file; with --per, the directory "
            "that holds them. Default: a new one below generated/.",
        ),
    ] = None,
    per: Annotated[
        str | None,
        typer.Option(
            "--per",
            metavar="line|FIELD",
            help="An adapter for each prompt (line), or for each value of a field of the rows.",
        ),
    ] = None,
    file_format: Annotated[
        Format | None,
        typer.Option("--format", help="With --per: how each adapter is written. Default: peft."),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Whole Hugging Face models: the base with the adapter.")
    ] = False,
    base_model: BaseModel = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Only the first so many prompts.")
    ] = None,
    draws: Annotated[
        int, typer.Option("--draws", min=1, help="The mean over random draws of the prompts.")
    ] = 1,
    prompts_per_draw: Annotated[
        int | None,
        typer.Option(
            "--prompts-per-draw",
            min=1,
            help="Prompts of a draw. Default: as in training, at most half of all.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the draws.")] = 0,
    force: Force = False,
    json: Json = False,
) -> None:
    """Turn a few unlabelled prompts of a dataset into a LoRA adapter, without training.

    A directory loads with `peft.PeftModel.from_pretrained(base, DIR)`; the base model itself is
    needed for --merge only. Prompts far from all that the generator was trained on are told.
    """
    from loragen.core.data.documents import parsed_source
    from loragen.core.errors import UsageError
    from loragen.core.generator.inference.draws import draw_prompts
    from loragen.core.generator.inference.requests import requests
    from loragen.core.runs import generator_file

    file = generator_file(model)
    if base_model and not merge:
        raise UsageError("--base-model goes with --merge; an adapter needs no base")
    asked = requests(prompt or (), [parsed_source(one) for one in prompt_file or ()], per, limit)
    places = _places([one.name for one in asked], output, per, file_format, merge, force)
    for one in asked:  # the draws themselves are made once the generator is known
        draw_prompts(one.prompts, draws, prompts_per_draw, seed, usual=len(one.prompts))

    from loragen.core.generator.inference.infer import infer as generate
    from loragen.core.generator.inference.merged import Merger
    from loragen.core.generator.model import Generator
    from loragen.core.quiet import quiet_libraries

    quiet_libraries()
    generator = Generator.load(file)
    merger = Merger(base_model or generator.base_model) if merge else None
    made = []
    for request, place in zip(asked, places, strict=True):
        made.append(
            generate(
                generator,
                request.prompts,
                place,
                draws=draws,
                prompts_per_draw=prompts_per_draw,
                seed=seed,
                overwrite=force,
                merger=merger,
            )
        )
        if not json:
            render.answer(str(place))
    _warn(made)
    if json:
        documents = [_document(one) for one in made]
        render.answer_json({"adapters": documents} if per else documents[0])
    else:
        _tell(made)


def _places(
    names: Sequence[str],
    output: Path | None,
    per: str | None,
    file_format: Format | None,
    merge: bool,
    force: bool,
) -> list[Path]:
    """Where each adapter goes. Raises UsageError where it cannot, for any of them."""
    from loragen.core.errors import UsageError
    from loragen.core.generator.inference.outputs import (
        FILE_SUFFIXES,
        check_output,
        default_output,
        place_of,
    )
    from loragen.core.runs import ADAPTER_CONFIG, MERGED_MARKER

    if file_format and not per:
        raise UsageError("--format goes with --per; for one adapter the ending of --output tells")
    home = output or default_output()
    files = file_format not in (None, Format.peft)
    if merge and (files or home.suffix in FILE_SUFFIXES):
        raise UsageError("--merge writes directories")
    places = [place_of(home, name, f".{file_format}" if files else "") for name in names]
    for place in places:
        check_output(place, force, MERGED_MARKER if merge else ADAPTER_CONFIG)
    return places


def _document(made: "Generated") -> dict[str, Any]:
    return {
        "adapter": str(made.path),
        "values": made.values,
        "seconds": made.seconds,
        **asdict(made.origin),
        "warning": made.origin.warning(),
    }


def _tell(made: Sequence["Generated"]) -> None:
    prompts, seconds = sum(one.origin.prompts for one in made), sum(one.seconds for one in made)
    adapters = "" if len(made) == 1 else f"{len(made)} adapters of "
    plural = "" if prompts == 1 else "s"
    render.note(
        f"{adapters}{made[0].values:,} values from {prompts} prompt{plural} in {seconds:.3f} s"
    )


def _warn(made: Sequence["Generated"]) -> None:
    """Of many adapters, the first few in full."""
    warnings = [(one.path, warning) for one in made if (warning := one.origin.warning())]
    for path, warning in warnings[:MOST_WARNINGS]:
        render.note(f"warning: {path}: {warning}" if len(made) > 1 else f"warning: {warning}")
    if len(warnings) > MOST_WARNINGS:
        render.note(f"warning: and {len(warnings) - MOST_WARNINGS} more adapters of such prompts")
