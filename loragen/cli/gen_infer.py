"""`loragen gen infer`: prompts -> adapters."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loragen.cli import render
from loragen.cli.options import BaseModel, Force, GeneratorPath, Json

if TYPE_CHECKING:
    from loragen.core.generator.inference.infer import Generated
    from loragen.core.generator.inference.requests import Request

MOST_WARNINGS = 3


class Format(StrEnum):
    peft = "peft"
    safetensors = "safetensors"
    pt = "pt"


Prompts = Annotated[
    list[str] | None, typer.Option("--prompt", help="A prompt of the dataset. Repeatable.")
]
PromptFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--prompt-file",
        help="Prompts: .txt (one a line), or rows or hub:owner/name as for lora train. Repeatable.",
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="A directory (PEFT), or a .safetensors or .pt file; with --per, the directory "
        "that holds them. Default: a new one below generated/.",
    ),
]
Per = Annotated[
    str | None,
    typer.Option(
        "--per",
        metavar="line|FIELD",
        help="An adapter for each prompt (line), or for each value of a field of the rows.",
    ),
]
FileFormat = Annotated[
    Format | None,
    typer.Option("--format", help="With --per: how each adapter is written. Default: peft."),
]
Merge = Annotated[
    bool, typer.Option("--merge", help="Whole Hugging Face models: the base with the adapter.")
]
Limit = Annotated[
    int | None, typer.Option("--limit", min=1, help="Only the first so many prompts.")
]
Draws = Annotated[
    int, typer.Option("--draws", min=1, help="The mean over random draws of the prompts.")
]
PromptsPerDraw = Annotated[
    int | None,
    typer.Option(
        "--prompts-per-draw",
        min=1,
        help="Prompts of a draw. Default: as in training, at most half of all.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Of the draws.")]


def infer(
    model: GeneratorPath,
    prompt: Prompts = None,
    prompt_file: PromptFiles = None,
    output: Output = None,
    per: Per = None,
    file_format: FileFormat = None,
    merge: Merge = False,
    base_model: BaseModel = None,
    limit: Limit = None,
    draws: Draws = 1,
    prompts_per_draw: PromptsPerDraw = None,
    seed: Seed = 0,
    force: Force = False,
    json: Json = False,
) -> None:
    """Turn a few unlabelled prompts of a dataset into a LoRA adapter, without training.

    A directory loads with `peft.PeftModel.from_pretrained(base, DIR)`; the base model itself is
    needed for --merge only. Prompts far from all that the generator was trained on are told.
    """
    from loragen.core.data.documents import parsed_source
    from loragen.core.errors import UsageError
    from loragen.core.generator.inference.requests import requests
    from loragen.core.runs import generator_file

    file = generator_file(model)
    if base_model and not merge:
        raise UsageError("--base-model goes with --merge; an adapter needs no base")
    asked = requests(prompt or (), [parsed_source(one) for one in prompt_file or ()], per, limit)
    places = _places([one.name for one in asked], output, per, file_format, merge, force)
    how = _How(draws, prompts_per_draw, seed, merge, base_model, force)
    how.check(asked)
    made = _generated(file, asked, places, how, tell=not json)
    _warn(made)
    if json:
        documents = [_document(one) for one in made]
        render.answer_json({"adapters": documents} if per else documents[0])
    else:
        _tell(made)


@dataclass(frozen=True)
class _How:
    """What all adapters of a command have in common."""

    draws: int
    prompts_per_draw: int | None
    seed: int
    merge: bool
    base_model: str | None
    force: bool

    def check(self, asked: Sequence["Request"]) -> None:
        """Raises UsageError where there are too few prompts; they are drawn once the generator is
        known."""
        from loragen.core.generator.inference.draws import draw_prompts

        for one in asked:
            count = len(one.prompts)
            draw_prompts(one.prompts, self.draws, self.prompts_per_draw, self.seed, usual=count)


def _generated(
    file: Path, asked: Sequence["Request"], places: Sequence[Path], how: _How, tell: bool
) -> list["Generated"]:
    """Writes every adapter, and answers with its place as soon as it is there."""
    from loragen.core.generator.inference.infer import infer as generate
    from loragen.core.generator.inference.merged import Merger
    from loragen.core.generator.model import Generator
    from loragen.core.quiet import quiet_libraries

    quiet_libraries()
    generator = Generator.load(file)
    merger = Merger(how.base_model or generator.base_model) if how.merge else None
    made = []
    for request, place in zip(asked, places, strict=True):
        made.append(
            generate(
                generator,
                request.prompts,
                place,
                draws=how.draws,
                prompts_per_draw=how.prompts_per_draw,
                seed=how.seed,
                overwrite=how.force,
                merger=merger,
            )
        )
        if tell:
            render.answer(str(place))
    return made


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
