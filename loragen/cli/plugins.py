"""`loragen plugins`: the installed plugins and their options."""

import inspect
from dataclasses import asdict
from typing import Annotated

import typer

from loragen.cli import render
from loragen.cli.options import Json

app = typer.Typer(no_args_is_help=True, help="See the installed plugins.")


@app.command("list")
def plugins_list(json: Json = False) -> None:
    """List every plugin by kind, with the package that provides it. Imports none of them."""
    from loragen.core.plugins import installed

    found = sorted(installed(), key=lambda plugin: (plugin.kind, plugin.name))
    if json:
        render.answer_json([asdict(plugin) for plugin in found])
        return
    rows = [(p.kind, p.name, p.distribution, p.version, p.target) for p in found]
    render.answer(render.columns(("kind", "name", "package", "version", "class"), rows))


@app.command("show")
def plugins_show(
    kind: Annotated[str, typer.Argument(help="logger, encoder, decoder, schedule or objective.")],
    name: Annotated[str, typer.Argument(help="A name from `loragen plugins list`.")],
    json: Json = False,
) -> None:
    """Show one plugin: its package, its description and its options."""
    from loragen.core.plugins import describe, find

    plugin, cls = describe(kind, name), find(kind, name)
    text = inspect.cleandoc(cls.__doc__ or "")
    options = {}
    for option, field in cls.Config.model_fields.items():
        type_name = str(field.annotation).replace("typing.", "")
        required = field.is_required()
        options[option] = {
            "type": type_name.removeprefix("<class '").removesuffix("'>"),
            "default": None if required else field.get_default(call_default_factory=True),
            "required": required,
            "description": field.description or "",
        }
    if json:
        render.answer_json({**asdict(plugin), "description": text, "options": options})
        return
    render.answer(f"{kind} {name}\nfrom   {plugin.origin}\nclass  {plugin.target}\n\n{text}\n")
    rows = [
        (key, o["type"], "required" if o["required"] else repr(o["default"]), o["description"])
        for key, o in options.items()
    ]
    header = ("option", "type", "default", "meaning")
    render.answer(render.columns(header, rows) if rows else "no options")
