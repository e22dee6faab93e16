"""`loragen config`: the defaults as a commented file."""

from enum import StrEnum
from typing import Annotated

import typer

from loragen.cli import render

app = typer.Typer(no_args_is_help=True, help="Write configuration files.")


class Command(StrEnum):
    lora = "lora"
    gen = "gen"


@app.command()
def init(
    command: Annotated[Command, typer.Argument(help="Which command the file is for.")],
) -> None:
    """Print the default configuration, each setting with its meaning."""
    from loragen.core.config import document

    render.answer(document(command.value))
