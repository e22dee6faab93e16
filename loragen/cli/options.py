"""Options that several commands share, and the translation of old configuration files."""

import json
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from loragen.cli import completion
from loragen.core.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from pydantic import BaseModel

    from loragen.core.config.load import Layers

Result = TypeVar("Result")


def _positive(value: float | None) -> float | None:
    if value is not None and not 0 < value < inf:
        raise UsageError(f"--alpha: expected a number above 0 (got {value:g})")
    return value


Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout, nothing else.")
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", "-c", help="A YAML file; see `loragen config init`.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Override one setting: key.path=value. Repeatable.",
        autocompletion=completion.settings,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Check everything and print the resolved YAML; write nothing."),
]
Force = Annotated[bool, typer.Option("--force", help="Replace an earlier output.")]
Resume = Annotated[
    Path | None,
    typer.Option(
        "--resume",
        "--resume-from-checkpoint",
        help="Resume a run from its newest checkpoint, or from the one named.",
        autocompletion=completion.resumable,
    ),
]
BaseModelName = Annotated[
    str | None,
    typer.Option(
        "--base-model", help="A hub id, a directory, a GGUF file, or demo (comes with loragen)."
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run the Python code that comes with the base model, if any."
    ),
]
GeneratorPath = Annotated[
    Path,
    typer.Option(
        "--model",
        help="An experiment directory, its generator_model.pt, or a checkpoint.",
        autocompletion=completion.experiments,
    ),
]
Alpha = Annotated[
    float | None,
    typer.Option("--alpha", callback=_positive, help="LoRA's alpha, instead of the recorded one."),
]
DATA_ROOT = Path("data_to_lora/cs")
_data_root = typer.Option("--data-root", help="The directory in which dataset names are looked up.")
DataRoot = Annotated[Path, _data_root]
OtherDataRoot = Annotated[Path | None, _data_root]
"""Instead of that of the configuration."""
EvalBatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Rows per forward pass.")]
TemplateKwargs = Annotated[
    str | None,
    typer.Option(
        "--chat-template-kwargs",
        metavar="JSON",
        help="""What the chat template is given, such as '{"enable_thinking": false}'; else what """
        "it was given in the adapter's training.",
    ),
]
PushToHub = Annotated[
    str | None,
    typer.Option(
        "--push-to-hub", metavar="OWNER/NAME", help="Also commit it to this repository of the hub."
    ),
]
Private = Annotated[
    bool,
    typer.Option("--private", help="Make the repository a private one, if it is a new one."),
]
License = Annotated[
    str | None,
    typer.Option(
        "--license", metavar="ID", help="The licence on the card, by the hub's id: apache-2.0."
    ),
]
IgnoreFinalPunctuation = Annotated[
    bool,
    typer.Option(
        "--ignore-final-punctuation", help="Compare answers without punctuation at their end."
    ),
]
SkipBadRows = Annotated[
    bool,
    typer.Option("--skip-bad-rows", help="Leave bad rows out, with a warning that counts them."),
]


def push_output(directory: Path, repository: str, private: bool, merged: bool) -> str:
    """Commits what loragen has written to a directory, and nothing else that lies there, to a
    repository of the hub; returns its URL, which is also printed. Raises as `hub.push`."""
    from loragen.cli import render
    from loragen.core.adapter import adapter_record, merged_record
    from loragen.core.hub import push

    files = (merged_record if merged else adapter_record)(directory) or {}
    url = push(directory, files, repository, private)
    render.note(f"pushed {len(files)} files to {url}")
    return url


def with_old_files(
    model: "type[BaseModel]", file: Path | None, use: "Callable[[Path | Layers | None], Result]"
) -> Result:
    """Returns `use(file)`, or `use` of its translation if the file is one of the original scripts.

    Only a file that does not validate is translated, with one warning. Raises the ConfigError of
    any other file.
    """
    try:
        return use(file)
    except ConfigError:
        if file is None:
            raise
        from loragen.legacy.translate import read_legacy_config

        translation = read_legacy_config(file, model)
        if translation is None:
            raise
    return use(translation)


def parsed_object(text: str, option: str) -> dict[str, Any]:
    """Returns the JSON object that is given to an option. Raises UsageError for anything else."""
    from loragen.core.contents import JSON_ERRORS, json_problem

    try:
        found = json.loads(text)
    except JSON_ERRORS as error:
        raise UsageError(f"{option}: {json_problem(text, error)}") from None
    if not isinstance(found, dict):
        raise UsageError(f"{option}: expected a JSON object, found {text}")
    return found


def parsed_template_kwargs(text: str | None) -> dict[str, Any] | None:
    """Returns `--chat-template-kwargs`, None if it is not given. Raises UsageError if it is not a
    JSON object of switches."""
    from loragen.core.config.schema import check_template_kwargs

    if text is None:
        return None
    try:
        return check_template_kwargs(parsed_object(text, "--chat-template-kwargs"))
    except ValueError as error:
        raise UsageError(f"--chat-template-kwargs: {error}") from None
