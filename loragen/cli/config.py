"""`loragen config`: write, check, explain and migrate configuration files."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from loragen.cli import options, render

app = typer.Typer(
    no_args_is_help=True, help="Write, check, explain and migrate configuration files."
)


class Command(StrEnum):
    lora = "lora"
    gen = "gen"


CommandArgument = Annotated[
    Command, typer.Argument(help="The command that is configured: lora or gen.")
]
CommandOption = Annotated[
    Command | None,
    typer.Option(
        "--command", help="The command that is configured; by default, that of the file's keys."
    ),
]
File = Annotated[Path, typer.Argument(help="A YAML file.")]


@app.command("init")
def config_init(command: CommandArgument) -> None:
    """Print the default configuration, with the meaning of every setting."""
    from loragen.core.config.show import commented_defaults

    render.answer(commented_defaults(command.value).rstrip())


@app.command("show")
def config_show(
    command: CommandArgument,
    config: options.ConfigFile = None,
    settings: options.Settings = None,
    json: options.Json = False,
) -> None:
    """Print every setting with its value and the origin of the value.

    A value comes from the default, the file (file:line:column), a LORAGEN_ variable or --set.
    """
    from loragen.core.config.schema import MODELS
    from loragen.core.config.show import resolved_settings
    from loragen.core.config.yaml_file import inline

    name = command.value
    found = options.with_old_files(
        MODELS[name], config, lambda file: resolved_settings(name, file, settings or ())
    )
    document = {s.key: {"value": s.value, "origin": s.origin} for s in found}
    rows = [(s.key, inline(s.value), s.origin) for s in found]
    render.answer_either(json, document, render.columns(("setting", "value", "from"), rows))


@app.command("validate")
def config_validate(file: File, command: CommandOption = None) -> None:
    """Check a file: print that it is valid, or all errors at once, each with its file:line.

    LORAGEN_ variables are not read. Datasets, runs, prompts and models that the file names have to
    exist, relative to the current directory; the hub is not queried.
    """
    from loragen.core.config import GenTrainConfig, LoraTrainConfig, load
    from loragen.core.config.load import guess_command
    from loragen.core.learning.sources import check_sources
    from loragen.core.lora.tasks import missing_lora_paths
    from loragen.legacy.translate import command_of_legacy_config

    name = command.value if command else command_of_legacy_config(file) or guess_command(file)
    model: Any = GenTrainConfig if name == "gen" else LoraTrainConfig
    missing: Any = check_sources if name == "gen" else missing_lora_paths
    options.with_old_files(
        model, file, lambda given: load(model, given, environment={}, check=missing)
    )
    render.answer(f"{file}: valid ({name} train)")


@app.command("migrate")
def config_migrate(
    file: File,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write to this file instead of stdout.")
    ] = None,
    command: CommandOption = None,
    force: options.Force = False,
) -> None:
    """Translate an old configuration file, with a comment beside everything that changed.

    The old files are training_config.yaml, lightning_config.yaml and generator_config.yaml of the
    original scripts. A file in the current form stays as it is.
    """
    from loragen.core.files import write_text
    from loragen.core.outputs import is_sealed, refuse_existing_file, refuse_input, sealed
    from loragen.legacy.translate import migrate_config

    if output is not None:
        refuse_input(output, [file])
        refuse_existing_file(output, force, is_sealed)
    result = migrate_config(file, command.value if command else None)
    if result.command is None:
        render.note(f"{file}: already in the current form; there is nothing to migrate")
    if output is None:
        render.answer(result.text.rstrip("\n"))
    else:
        write_text(output, sealed(result.text))
        render.answer(str(output))


@app.command("schema")
def config_schema(command: CommandArgument) -> None:
    """Print the JSON schema of a configuration, with the options of the installed plugins.

    Editors with a YAML language server use it to complete and to check.
    """
    from loragen.core.config.show import json_schema

    render.answer_json(json_schema(command.value))
