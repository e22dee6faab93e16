"""The `loragen` command, which assembles the groups of commands and reports errors.

Neither this module nor those of the commands import anything heavy; a command imports what it needs
when it runs, so that `--help` answers at once.
"""

import errno
import inspect
import os
import re
import signal
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from loragen import __version__
from loragen.cli import (
    ckpt,
    config,
    data,
    demo,
    gen,
    library,
    lora,
    plugins,
    render,
    runs,
    serve,
    sweep,
)
from loragen.cli.completion import whole_words
from loragen.cli.streams import lost_output, make_streams_last
from loragen.core.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    LoragenError,
    one_line,
    shortened,
)
from loragen.core.files import DISK_ERRORS

# torch reads this when it is loaded. With threads that spin while they wait, two trainings on one
# machine are ten times slower than with threads that sleep; a single training is as fast.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# On Linux, torch then allocates large tensors in pages of 2 MiB. Page faults of 4 KiB each take
# longer than most operations on fresh memory: with this, `gen train` takes half the time.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

OLD_SPELLINGS = {"out": "output", "output-dir": "output"}
"""{spelling in the original scripts: option}"""


class Root(TyperGroup):
    """The root command. It reports an exception in one line on stderr and by an exit code."""

    interrupts = 0
    """The number of Ctrl+C outside of a training; a training handles it itself."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Accepts `--debug` anywhere on the line, not only before the command."""
        end = args.index("--") if "--" in args else len(args)
        if "--debug" in args[:end]:
            ctx.obj = {"debug": True}
            args = ["--debug", *(a for i, a in enumerate(args) if i >= end or a != "--debug")]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        debug = bool((ctx.obj or {}).get("debug"))
        try:
            return super().invoke(ctx)
        except LoragenError as error:
            if debug:
                raise
            render.problems(error.problems)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            render.problems(["interrupted"])
            raise typer.Exit(EXIT_INTERRUPTED) from error
        except Exception as error:  # a bug of loragen or of a library
            if self.interrupts:  # an interrupted import may raise any error
                render.problems(["interrupted"])
                raise typer.Exit(EXIT_INTERRUPTED) from error
            if isinstance(error, OSError) and error.errno in DISK_ERRORS and not debug:
                render.problems([f"{error.filename or 'writing'}: {error.strerror}"])
                raise typer.Exit(EXIT_FAILED) from error
            if type(error).__name__ == "NoSuchOption":
                _hint_at_setting(error)
            if debug or type(error).__module__.startswith("typer."):  # Exit, Abort, usage errors
                raise
            if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
                render.problems([f"{shortened(str(error.filename), 60)}: the name is too long"])
                raise typer.Exit(EXIT_USAGE) from error
            render.problems([f"{one_line(error)} (--debug shows where)"])
            raise typer.Exit(EXIT_FAILED) from error


def _hint_at_setting(error: Any) -> None:
    """Adds to an unknown option of a training what was meant by it: another option, or a `--set`,
    such as `--set lora.rank=VALUE` for the `--lora_r` of others."""
    context = error.ctx
    group = context.parent.info_name if context and context.parent else ""
    options = {p.name: p.opts[0] for p in context.command.params} if context else {}
    if group not in ("lora", "gen") or "settings" not in options:
        return
    from loragen.core.config.keys import COMMON_NAMES, meant
    from loragen.core.config.schema import MODELS

    given = error.option_name.lstrip("-").replace("-", "_")
    if error.possibilities and given not in COMMON_NAMES:
        return  # a slip in an option of this command
    if key := meant(MODELS[group], (given,)):
        error.possibilities = None
        name, _, value = key.partition(": ")
        setting = f"--set {name}={value or 'VALUE'}"
        error.message += f". Did you mean {options.get(name.rpartition('.')[2], setting)}?"


def _normalize_option(option: str) -> str:
    """Returns an option by its current name, with `-` for the `_` of the original scripts."""
    option = option.replace("_", "-")
    return OLD_SPELLINGS.get(option, option)


app = typer.Typer(
    cls=Root,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": _normalize_option,
    },
)
app.add_typer(data.app, name="data")
app.add_typer(lora.app, name="lora")
app.add_typer(gen.app, name="gen")
app.add_typer(library.app, name="library")
app.add_typer(sweep.app, name="sweep")
app.add_typer(runs.app, name="runs")
app.add_typer(ckpt.app, name="ckpt")
app.add_typer(config.app, name="config")
app.add_typer(plugins.app, name="plugins")
app.command("demo")(demo.run_demo)
app.command("serve")(serve.run_server)


def _unwrap_help(of: typer.Typer) -> None:
    """Makes each paragraph of the commands' docstrings one line, which the terminal wraps."""
    documented: list[Any] = list(of.registered_commands)
    if of.registered_callback:
        documented.append(of.registered_callback)
    for command in documented:
        text = inspect.getdoc(command.callback) or ""
        command.help = re.sub(r"(?<!\n)\n(?!\n)", " ", text)
    for group in of.registered_groups:
        assert group.typer_instance is not None
        _unwrap_help(group.typer_instance)


def _show_version(wanted: bool) -> None:
    if wanted:
        render.answer(f"loragen {__version__}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[  # noqa: ARG001  # Root.parse_args reads it, from anywhere on the line
        bool, typer.Option("--debug", help="Show the traceback of an error.")
    ] = False,
    version: Annotated[  # noqa: ARG001  # its callback handles it
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Prompts in, LoRA adapters out.

    Collect adapters (lora train), learn a generator (gen train), generate an adapter from a few
    prompts without training (gen infer), and evaluate the result (gen eval, lora eval, ckpt
    analyze).
    """
    render.log_to_stderr()


_unwrap_help(app)


def main() -> None:
    """Runs the command line; the entry point of the `loragen` script."""

    def count_interrupt(number: int, frame: Any) -> None:
        Root.interrupts += 1
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, count_interrupt)
    if os.environ.get("_LORAGEN_COMPLETE") == "complete_bash":
        with whole_words(os.environ):
            app()
    make_streams_last()
    try:
        app()
    except SystemExit as ended:
        if problem := lost_output():
            render.problems([f"stdout: {problem}"])
            raise SystemExit(ended.code or EXIT_FAILED) from ended
        raise
