"""`loragen ckpt`: know what the weights are."""

import typer

from loragen.cli.ckpt_analyze import analyze
from loragen.cli.ckpt_convert import convert
from loragen.cli.ckpt_lines import lines
from loragen.cli.ckpt_test import test

app = typer.Typer(no_args_is_help=True, help="Look into checkpoints, and convert old ones.")
for command in (analyze, test, lines, convert):
    app.command()(command)
