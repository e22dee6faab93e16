"""`loragen config`: write, check, explain and migrate configuration files."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from loragen.cli import render
from loragen.cli.options import ConfigFile, Force, Json, Settings, with_old_files

app = typer.Typer(
    no_args_is_help=True, help="Write, check, explain and migrate configuration files."
)


class Command(StrEnum):
    lora = "lora"
    gen = "gen"


Whose = Annotated[Command, typer.Argument(help="Which command's configuration: lora or gen.")]
WhoseFile = Annotated[
    Command | None, typer.Option("--command", help="Whose file it is; else its keys tell.")
]
File = Annotated[Path, typer.Argument(help="A YAML file.")]


@app.command()
def init(command: Whose) -> None:
    """Print the default configuration, each setting with its meaning."""
    from loragen.core.config.show import commented_defaults

    render.answer(commented_defaults(command.value).rstrip())


@app.command()
def show(
    command: Whose, config: ConfigFile = None, settings: Settings = None, json: Json = False
) -> None:
    """Print every setting, its value, and where that came from.

    A value comes from the default, the file (file:line:column), a LORAGEN_ variable or --set.
    """
    from loragen.core.config.schema import MODELS
    from loragen.core.config.show import resolved_settings
    from loragen.core.config.yaml_file import inline

    found = with_old_files(
        MODELS[command.value],
        config,
        lambda file: resolved_settings(command.value, file, settings or ()),
    )
    if json:
        document = {s.key: {"value": s.value, "origin": s.origin} for s in found}
        render.answer_json(document)
    else:
        rows = [(s.key, inline(s.value), s.origin) for s in found]
        render.answer(render.columns(("setting", "value", "from"), rows))


@app.command()
def validate(
    file: File,
    command: WhoseFile = None,
) -> None:
    """Check a file: prints that it is valid, or every error at once, each with its file:line.

    The file alone is judged, without LORAGEN_ variables. What it names has to be there, seen from
    here, as the training would look for it: datasets, runs, prompts, models; the hub is not asked.
    """
    from loragen.core.config import GenTrainConfig, LoraTrainConfig, load
    from loragen.core.config.load import guess_command
    from loragen.core.learning.sources import missing_gen_paths
    from loragen.core.lora.settings import missing_lora_paths
    from loragen.legacy.translate import old_command_of

    whose = command.value if command else old_command_of(file) or guess_command(file)

    model: Any = GenTrainConfig if whose == "gen" else LoraTrainConfig
    missing: Any = missing_gen_paths if whose == "gen" else missing_lora_paths
    with_old_files(model, file, lambda given: load(model, given, environment={}, check=missing))
    render.answer(f"{file}: valid ({whose} train)")


@app.command()
def migrate(
    file: File,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write it there instead of printing it.")
    ] = None,
    command: WhoseFile = None,
    force: Force = False,
) -> None:
    """Turn an old configuration file into today's, with a comment beside all that changed.

    Old are training_config.yaml, lightning_config.yaml and generator_config.yaml of the scripts
    that loragen grew from. A file that is today's already stays as it is.
    """
    from loragen.core.errors import UsageError
    from loragen.core.files import write_text
    from loragen.legacy.translate import migrate as migrated

    if output is not None and output.exists() and (output.is_dir() or not force):
        hint = "is a directory" if output.is_dir() else "exists already"
        raise UsageError(f"{output} {hint}; choose another place or add --force")
    result = migrated(file, command.value if command else None)
    if result.command is None:
        render.note(f"{file} is not in an old form: nothing to migrate")
    if output is None:
        render.answer(result.text.rstrip("\n"))
    else:
        write_text(output, result.text)
        render.answer(str(output))


@app.command()
def schema(command: Whose) -> None:
    """Print the JSON schema of a configuration, with the options of the installed plugins.

    An editor with a YAML language server completes and checks with it.
    """
    from loragen.core.config.show import json_schema

    render.answer_json(json_schema(command.value))
