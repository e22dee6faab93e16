"""`loragen data`: know what the rows are."""

import typer

from loragen.cli.uses import uses

app = typer.Typer(no_args_is_help=True, help="Look at a dataset.")
app.command()(uses)


@app.callback()
def group() -> None:
    """Keeps `uses` a subcommand while it is the only one."""
