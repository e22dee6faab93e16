"""Flags that several commands share, each written once."""

from math import inf
from pathlib import Path
from typing import Annotated

import typer

from loragen.core.errors import UsageError


def _above_zero(value: float | None) -> float | None:
    if value is not None and not 0 < value < inf:
        raise UsageError(f"--alpha: has to be a number above 0 (got {value:g})")
    return value


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
GeneratorPath = Annotated[
    Path, typer.Option("--model", help="An experiment, its generator_model.pt or a checkpoint.")
]
Alpha = Annotated[
    float | None,
    typer.Option(
        "--alpha", callback=_above_zero, help="LoRA's alpha; counts more than what is recorded."
    ),
]
DataRoot = Annotated[
    str | None, typer.Option("--data-root", help="Where dataset names are looked up.")
]
SkipBadRows = Annotated[
    bool, typer.Option("--skip-bad-rows", help="Leave bad rows out, and tell how many.")
]
