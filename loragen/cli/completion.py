"""What the shell completes beside commands and options: datasets, runs, plugins and settings.

The shell starts the command at every TAB, so that nothing heavy is imported here. A function
returns what begins with `incomplete`; if that is nothing, the shell completes file names.
"""

import io
import json
import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any, get_args

import typer

NEWEST = 100
"""The most runs that are offered."""


def datasets(ctx: typer.Context, incomplete: str) -> list[str]:
    """The names below `--data-root`, or below `data.root` of `--config`."""
    from loragen.core.config.schema import LoraDataSection
    from loragen.core.data.dataset import dataset_names

    root = ctx.params.get("data_root") or os.environ.get("LORAGEN_DATA__ROOT")
    if not root and ctx.params.get("config"):
        from loragen.core.config.yaml_file import read_yaml

        with suppress(Exception):  # an invalid file is refused later
            root = read_yaml(Path(ctx.params["config"]))[0]["data"]["root"]
    root = root or LoraDataSection.model_fields["root"].default
    split = "test" if ctx.info_name == "eval" else "train"
    return [name for name in dataset_names(Path(root), split) if name.startswith(incomplete)]


def runs(ctx: typer.Context, incomplete: str) -> list[str]:
    """The runs of `lora train` below `--runs-dir`."""
    folder = ctx.params.get("runs_dir") or os.environ.get("LORAGEN_RUNS_DIR") or "runs"
    return _directories(Path(folder), "lora", incomplete)


def experiments(incomplete: str) -> list[str]:
    """The runs of `gen train`."""
    folder = os.environ.get("LORAGEN_EXPERIMENTS_DIR") or "experiments"
    return _directories(Path(folder), "generator", incomplete)


def every_run(incomplete: str) -> list[str]:
    """The runs of both trainings."""
    folder = Path(os.environ.get("LORAGEN_RUNS_DIR") or "runs")
    return [*_directories(folder, "lora", incomplete), *experiments(incomplete)]


def resumable(ctx: typer.Context, incomplete: str) -> list[str]:
    """The runs that a training may resume."""
    return experiments(incomplete) if _command(ctx) == "gen" else runs(ctx, incomplete)


def shared_adapters(ctx: typer.Context, incomplete: str) -> list[str]:
    """The adapters of the library that is given before, if it is a folder."""
    folder = Path(str(ctx.params.get("library") or ctx.params.get("source") or ""))
    names = sorted(file.parent.name for file in folder.glob("*/entry.json"))
    return [name for name in names if name.startswith(incomplete)]


def kinds(incomplete: str) -> list[str]:
    from loragen.core.plugins import KINDS

    return [kind for kind in KINDS if kind.startswith(incomplete)]


def plugin_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """The installed plugins of the kind that is given before."""
    from loragen.core.plugins import names

    return [name for name in names(ctx.params.get("kind") or "") if name.startswith(incomplete)]


def settings(ctx: typer.Context, incomplete: str) -> list[str]:
    """`key=` of each setting, and of a single one `key=value` with each value that is known.

    A shell that has only one match adds a space; the values, or the default, prevent that.
    """
    key, equals, _ = incomplete.partition("=")
    found = dict(_settings_of(_command(ctx)))
    if not equals:
        matching = [one for one in found if one.startswith(key)]
        if len(matching) != 1:
            return [f"{one}=" for one in matching]
        key = matching[0]
    values = [f"{key}={value}" for value in found.get(key, ())]
    if not equals:
        return [f"{key}=", *values]
    return [value for value in values if value.startswith(incomplete)]


@contextmanager
def whole_words(environment: MutableMapping[str, str]) -> Iterator[None]:
    """Makes the words of bash whole, as other shells give them.

    bash splits them at every `=` (`--set`, `key`, `=`, `value`), and puts a completion in the place
    of the last piece alone: what the block prints loses the pieces before it.
    """
    words = environment.get("COMP_WORDS", "").split("\n")
    current = int(environment.get("COMP_CWORD", "0"))
    whole: list[str] = []
    for index, word in enumerate(words[: current + 1]):
        if len(whole) > 1 and "=" in (word, words[index - 1]):
            whole[-1] += word
        else:
            whole.append(word)
    environment["COMP_WORDS"], environment["COMP_CWORD"] = "\n".join(whole), str(len(whole) - 1)
    before, equals, _ = whole[-1].rpartition("=")
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            yield
    finally:
        for line in printed.getvalue().splitlines():
            print(line.removeprefix(before + equals))


def _command(ctx: typer.Context) -> str:
    """Returns which command the settings are of: `lora` or `gen`."""
    group = ctx.parent.info_name if ctx.parent else None
    if group == "config":  # its argument, which is not parsed yet if the option lacks its value
        named: Any = ctx.params.get("command") or next(iter(ctx.args), "")
        return str(getattr(named, "value", named))
    return group or ""


def _directories(folder: Path, kind: str, incomplete: str) -> list[str]:
    """Returns the newest run directories of a kind of manifest in a folder."""
    found = []
    with suppress(OSError):
        files = sorted(folder.glob("*/manifest.json"), key=lambda file: -file.stat().st_mtime)
        for file in files[:NEWEST]:
            with suppress(OSError, ValueError):
                if json.loads(file.read_bytes()).get("kind") == kind:
                    found.append(str(file.parent))
    return [path for path in found if path.startswith(incomplete)]


def _settings_of(command: str) -> Iterator[tuple[str, list[str]]]:
    """Yields every setting of a command, and values that it may have."""
    from pydantic import BaseModel

    from loragen.core.config.keys import all_keys
    from loragen.core.config.schema import AUTO, MODELS
    from loragen.core.config.yaml_file import inline
    from loragen.core.plugins import KINDS, names

    if command not in MODELS:
        return
    for key, info in all_keys(MODELS[command]):
        if isinstance(info.default, BaseModel):
            continue  # a section
        kind, _, last = key.partition(".")
        choices = [
            value
            for part in (info.annotation, *get_args(info.annotation))
            for value in get_args(part)
            if isinstance(value, str)
        ]
        if last == "name" and kind in KINDS:
            yield key, [*names(kind), *([AUTO] if kind == "decoder" else [])]
        elif key == "training.objective":
            yield key, [AUTO, *names("objective")]
        elif key == "loggers":
            yield from ((f"loggers.{name}", ["{}"]) for name in names("logger"))
        elif info.annotation is bool:
            yield key, ["true", "false"]
        elif choices:
            yield key, choices
        elif info.is_required():
            yield key, []
        else:
            yield key, [inline(info.get_default(call_default_factory=True))]
