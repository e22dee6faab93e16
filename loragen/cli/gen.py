"""`loragen gen`: learn a generator, generate adapters with it, and judge them."""

import typer

from loragen.cli.gen_eval import evaluate
from loragen.cli.gen_infer import infer
from loragen.cli.gen_train import train

app = typer.Typer(no_args_is_help=True, help="Train a generator, and generate adapters.")
for name, command in (("train", train), ("infer", infer), ("eval", evaluate)):
    app.command(name)(command)
