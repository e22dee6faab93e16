"""Flags that several commands share, each written once."""

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout, nothing else.")
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", "-c", help="A YAML file; see `loragen config init`.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override one setting: key.path=value. Repeatable."),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Check everything, print the resolved YAML, touch nothing."),
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
BaseModel = Annotated[
    str | None, typer.Option("--base-model", help="A hub id, a directory, or demo (shipped).")
]
DataRoot = Annotated[
    str | None, typer.Option("--data-root", help="Where dataset names are looked up.")
]
SkipBadRows = Annotated[
    bool, typer.Option("--skip-bad-rows", help="Leave bad rows out, and tell how many.")
]
