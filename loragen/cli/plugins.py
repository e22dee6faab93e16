"""`loragen plugins`: those installed, their options and faults, and a package for a new one."""

import inspect
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from loragen.cli import completion, options, render
from loragen.core.errors import EXIT_FAILED, counted

app = typer.Typer(no_args_is_help=True, help="See the installed plugins, and write a new one.")

KIND_HELP = "logger, encoder, decoder, schedule or objective."


@app.command("list")
def plugins_list(json: options.Json = False) -> None:
    """List every plugin by kind, with the package that provides it. Imports none of them."""
    from loragen.core.plugins import installed

    found = sorted(installed(), key=lambda plugin: (plugin.kind, plugin.name))
    rows = [(p.kind, p.name, p.distribution, p.version, p.target) for p in found]
    text = render.columns(("kind", "name", "package", "version", "class"), rows)
    render.answer_either(json, [asdict(plugin) for plugin in found], text)


@app.command("show")
def plugins_show(
    kind: Annotated[str, typer.Argument(help=KIND_HELP, autocompletion=completion.kinds)],
    name: Annotated[
        str,
        typer.Argument(
            help="A name from `loragen plugins list`.", autocompletion=completion.plugin_names
        ),
    ],
    json: options.Json = False,
) -> None:
    """Show one plugin: its package, its file, its description and its options."""
    from loragen.core.plugins import describe, find
    from loragen.scaffold import CHOOSE

    plugin, cls = describe(kind, name), find(kind, name)
    text = inspect.cleandoc(cls.__doc__ or "")
    file = inspect.getsourcefile(cls) or "?"
    described = {}
    for option, field in cls.Config.model_fields.items():
        type_name = str(field.annotation).replace("typing.", "")
        required = field.is_required()
        described[option] = {
            "type": type_name.removeprefix("<class '").removesuffix("'>"),
            "default": None if required else field.get_default(call_default_factory=True),
            "required": required,
            "description": field.description or "",
        }
    if json:
        render.answer_json(
            {**asdict(plugin), "file": file, "description": text, "options": described}
        )
        return
    head = (("from", plugin.origin), ("class", plugin.target), ("file", file))
    lines = [f"{kind} {name}", *(f"{key:5}  {value}" for key, value in head)]
    lines.append(f"use    loragen {CHOOSE[kind].format(name)}")
    render.answer("\n".join([*lines, "", text, ""]))
    rows = [
        (key, o["type"], "required" if o["required"] else repr(o["default"]), o["description"])
        for key, o in described.items()
    ]
    header = ("option", "type", "default", "meaning")
    render.answer(render.columns(header, rows) if rows else "no options")


@app.command("new")
def plugins_new(
    name: Annotated[
        str, typer.Argument(help="By what users choose it: lower-case, digits and hyphens.")
    ],
    kind: Annotated[str, typer.Option("--kind", help=KIND_HELP, autocompletion=completion.kinds)],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A new directory. Default: loragen-NAME, here."),
    ] = None,
    json: options.Json = False,
) -> None:
    """Write a package with a new plugin, its tests and a CI workflow, and say what to do next.

    The class is a working example of its kind, for you to change. The package passes its own tests,
    ruff and mypy; once it is installed, `loragen plugins list` shows it.
    """
    from loragen.scaffold import Scaffold

    package = Scaffold(name, kind)
    directory = output or Path(package.package)
    written = package.write(directory)
    commands = package.commands(directory)
    if json:
        document = {"directory": str(directory), "files": written, "next": commands}
        render.answer_json(document)
        return
    render.answer(str(directory))
    render.note("\n".join(["next:", *(f"  {command}" for command in commands)]))


@app.command("doctor")
def plugins_doctor(json: options.Json = False) -> None:
    """Import every plugin, and say of each broken one what is wrong. Exits with 1 if any is.

    Seen are entry points and classes that do not import, missing or unknown hooks, names that two
    packages offer, a Config that is missing or accepts unknown options, a constructor with other
    arguments, and missing methods. No plugin is constructed: the checks of `loragen.testing` do so.
    """
    from loragen.core.diagnosis import diagnose

    plugins, faults = diagnose()
    if json:
        render.answer_json({"plugins": len(plugins), "faults": [asdict(one) for one in faults]})
    else:
        for fault in faults:
            render.answer(render.visible(f"{fault.subject}: {fault.reason}"))
        if not faults:
            render.answer(f"{counted(len(plugins), 'plugin')}: nothing is wrong with them")
    if faults:
        render.problems([f"{counted(len(faults), 'fault')} of plugins"])
        raise typer.Exit(EXIT_FAILED)
