"""Flags that several commands share, each written once."""

from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from loragen.core.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from pydantic import BaseModel as Model

    from loragen.core.config.load import Layers

Result = TypeVar("Result")


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


def with_old_files(
    model: "type[Model]", file: Path | None, use: "Callable[[Path | Layers | None], Result]"
) -> Result:
    """`use(file)`. A file that does not validate is shown to `legacy`: one of the original scripts
    is translated, with one warning, and used in its place; for any other the errors stand."""
    try:
        return use(file)
    except ConfigError:
        if file is None:
            raise
        from loragen.legacy.translate import read_old_file

        translation = read_old_file(file, model)
        if translation is None:
            raise
    return use(translation)
