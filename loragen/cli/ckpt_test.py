"""`loragen ckpt test`: is a checkpoint one that a generator can learn?"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from loragen.cli import render
from loragen.cli.options import Json
from loragen.core.errors import DataError, UsageError

if TYPE_CHECKING:
    from loragen.core.analysis.tokenized import Tokenized


def test(
    file: Annotated[
        Path | None,
        typer.Argument(help="A .ckpt, .pt, .safetensors, a PEFT directory, or a run (its newest)."),
    ] = None,
    checkpoint_file: Annotated[Path | None, typer.Option(hidden=True)] = None,
    max_tokens: Annotated[
        str, typer.Option("--max-tokens", metavar="N|auto", help="As many as the layout may have.")
    ] = "auto",
    token_dim: Annotated[
        int, typer.Option("--token-dim", min=1, help="Values of one token.")
    ] = 384,
    json: Json = False,
) -> None:
    """Tokenise one adapter as a generator does: its layout, tokens, fill, and the round trip.

    Exits with 1 where it needs more than --max-tokens, or does not come back bit for bit.
    """
    path = _the_one(file, checkpoint_file)
    most = _most(max_tokens)
    if not path.exists():
        raise UsageError(f"{path}: no such checkpoint")

    from loragen.core.analysis.tokenized import tokenized

    report = tokenized(path, token_dim, most)
    if json:
        render.answer_json(report.as_dict())
    else:
        _show(report)
    if not report.fits:
        raise DataError(
            f"{report.file} does not fit: --max-tokens is {report.max_tokens} and it needs "
            f"{report.tokens} tokens of {token_dim} values: give {report.tokens} or auto"
        )
    if report.bits_changed:
        raise DataError(f"{report.file} does not come back unchanged from its tokens")


def _the_one(file: Path | None, option: Path | None) -> Path:
    if (file is None) == (option is None):
        raise UsageError("which checkpoint? Give one: loragen ckpt test FILE")
    path = file or option
    assert path is not None
    return path


def _most(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) == 0:
        raise UsageError(f"--max-tokens: a whole number above 0, or auto (got {text})")
    return int(text)


def _show(report: "Tokenized") -> None:
    rows = [
        (
            kind.module,
            kind.matrix,
            kind.tensors,
            kind.layers or None,
            " × ".join(map(str, kind.shape)),
            kind.dtype,
            kind.tokens_each,
            kind.tokens_each * kind.tensors,
        )
        for kind in report.kinds
    ]
    header = ("module", "matrix", "tensors", "layers", "shape", "dtype", "tokens each", "tokens")
    exact = "exact, bit for bit" if not report.bits_changed else "CHANGED"
    render.answer(
        f"{report.file}\n\n{render.columns(header, rows)}\n\n"
        f"{report.values:,} values in {report.tensors} tensors\n"
        f"{report.tokens:,} tokens of {report.token_dim}, {report.fill:.1%} filled\n"
        f"round trip: {exact} ({report.bits_changed} values changed, "
        f"largest error {report.largest_error:g})"
    )
