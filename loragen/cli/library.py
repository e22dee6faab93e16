"""`loragen library`: adapters that a team shares, in a folder or on the hub."""

from pathlib import Path
from typing import Annotated

import typer

from loragen.cli import completion, options, render
from loragen.core.errors import UsageError, counted

app = typer.Typer(
    no_args_is_help=True, help="Share adapters and their prompts, in a folder or on the hub."
)

Place = Annotated[
    str,
    typer.Argument(
        metavar="LIBRARY", help="A folder, or hf://owner/name, with a /folder in it if needed."
    ),
]
SHORT = 40
"""The widest base model in a table, in characters."""


@app.command("add")
def library_add(
    library: Place,
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER",
            help="Runs of lora train, a folder of them, checkpoints, PEFT directories, or adapters "
            "of a library; hf://owner/name for any of them on the hub.",
            autocompletion=completion.runs,
        ),
    ],
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            help="The prompts that it was trained on: rows, .txt (one per line), or "
            "hub:owner/name. Default: those of its run.",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Its name there. Default: that of its dataset.")
    ] = None,
    prompts_only: Annotated[
        bool, typer.Option("--prompts-only", help="Leave the answers out, where they are known.")
    ] = False,
    base_model: Annotated[
        str | None,
        typer.Option(
            "--base-model", help="Record this base, such as a hub id for a path of this machine."
        ),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option("--encoder", help="The encoder of a new library's centres. Default: sbert."),
    ] = None,
    encoder_options: Annotated[
        str | None,
        typer.Option(
            "--encoder-options", metavar="JSON", help="""Its options: '{"model": "DIR"}'."""
        ),
    ] = None,
    license_id: options.License = None,
    private: options.Private = False,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Add adapters with the prompts that they were trained on; the first makes the library.

    All adapters of a library are for one base model and have one layout. If one of those given does
    not fit, none is added. What the library has already, with the same weights and prompts, stays
    as it is.

    The answers are added with the prompts, because the best objectives of gen train need them.
    """
    from loragen.core.learning.library.changes import AddOptions, add_adapters

    given = options.parsed_object(encoder_options, "--encoder-options") if encoder_options else None
    chosen = AddOptions(prompts, name, not prompts_only, base_model, encoder, given, license_id)
    changes = add_adapters(library, adapters, chosen, force=force, private=private)
    _report(library, changes.added, changes.unchanged, changes.url, json)


@app.command("list")
def library_list(
    library: Place,
    like: Annotated[
        str | None,
        typer.Option(
            "--like",
            metavar="FILE",
            help="Prompts, as for add: the adapters of the most similar prompts come first.",
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """List the adapters of a library. Of one on the hub, no weights are downloaded."""
    from loragen.core.learning.library.records import AdapterLibrary

    found = AdapterLibrary.open(library)
    listed = found.listed(like)
    if json:
        assert found.record is not None  # `open` has checked it
        documents = [
            {"name": one.name, "similarity": one.similarity, **one.entry.model_dump()}
            for one in listed
        ]
        encoder = found.record.encoder.model_dump()
        render.answer_json({"library": library, "encoder": encoder, "adapters": documents})
        return
    if not listed:
        render.note(f"{library}: no adapters in it")
        return
    header = ["name", "prompts", "answers", "rank", "values", "base model", "added"]
    rows: list[list[object]] = []
    for one in listed:
        entry = one.entry
        base = (
            entry.base_model if len(entry.base_model) <= SHORT else f"…{entry.base_model[-SHORT:]}"
        )
        answers = "yes" if entry.answers else "no"
        added = entry.added[:10]
        rows.append(
            [one.name, entry.prompts, answers, entry.rank, f"{entry.values:,}", base, added]
        )
        if like:
            rows[-1].insert(1, one.similarity)
    if like:
        header.insert(1, "similarity")
    render.answer(render.columns(header, rows))


@app.command("get")
def library_get(
    library: Place,
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="Its name in the library.",
            autocompletion=completion.shared_adapters,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new directory.")],
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Write one adapter to an ordinary PEFT directory."""
    from loragen.core.learning.library.changes import get_adapter

    get_adapter(library, name, output, force)
    if json:
        render.answer_json({"library": library, "name": name, "output": str(output)})
    else:
        render.answer(str(output))


@app.command("rm")
def library_rm(
    library: Place,
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME",
            help="Their names in the library.",
            autocompletion=completion.shared_adapters,
        ),
    ],
    json: options.Json = False,
) -> None:
    """Remove adapters: what loragen has written, and nothing else. The hub keeps its history."""
    from loragen.core.learning.library.changes import remove_adapters

    remove_adapters(library, names)
    if json:
        render.answer_json({"library": library, "removed": list(dict.fromkeys(names))})
    else:
        render.note(f"{library}: removed {counted(len(set(names)), 'adapter')}")


@app.command("copy")
def library_copy(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A library: a folder, or hf://owner/name.")
    ],
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="Another one, which may be a new one.")
    ],
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME",
            help="Which adapters. Default: all.",
            autocompletion=completion.shared_adapters,
        ),
    ] = None,
    private: options.Private = False,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Copy adapters from one library to another: to the hub, from it, or between folders."""
    from loragen.core.learning.library.changes import copy_adapters

    if source.rstrip("/") == target.rstrip("/"):
        raise UsageError(f"{target}: the source and the target are one library")
    changes = copy_adapters(source, target, names or [], force=force, private=private)
    _report(target, changes.added, changes.unchanged, changes.url, json)


def _report(
    library: str, added: list[str], unchanged: list[str], url: str | None, json: bool
) -> None:
    if json:
        document = {"library": library, "added": added, "unchanged": unchanged, "repository": url}
        render.answer_json(document)
        return
    for name in unchanged:
        render.note(f"{name}: there already, with the same weights and prompts")
    for name in added:
        render.answer(f"{library.rstrip('/')}/{name}")
