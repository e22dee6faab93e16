"""Where a generated adapter may be written; checked without torch, before anything is loaded.

Random draws of prompts: an adapter is made of each, and their mean is taken.

Which adapters are asked for: one for all prompts, one for each, or one for each group of rows.

Read without torch, so that mistakes are told before anything is loaded.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from loragen.core.adapter import CONFIG_FILE
from loragen.core.data.documents import Source, read_documents
from loragen.core.data.formats import question_of
from loragen.core.data.prompts import read_prompts
from loragen.core.data.rows import BadRow, bad_lines
from loragen.core.errors import DataError, UsageError, listing
from loragen.core.files import file_name, refuse_existing, refuse_file

FILE_SUFFIXES = (".safetensors", ".pt")
OTHER_WEIGHTS = (".bin", ".ckpt", ".gguf", ".npz", ".pth")


def default_output() -> Path:
    """`generated/adapter-001`, or the first number that is free."""
    number = 1
    while (path := Path("generated") / f"adapter-{number:03d}").exists():
        number += 1
    return path


def place_of(output: Path, name: str, suffix: str) -> Path:
    """Of one adapter among several, by its name; the only one (no name) is the output itself.

    Raises UsageError where several would go into one file.
    """
    if not name:
        return output
    if output.suffix in FILE_SUFFIXES:
        raise UsageError(
            f"{output}: --per writes a directory; for files in it, add --format {output.suffix[1:]}"
        )
    return output / f"{name}{suffix}"


def check_output(path: Path, overwrite: bool, marker: str = CONFIG_FILE) -> None:
    """Raises UsageError where something is at `path` that must not be replaced.

    With `overwrite`, a weights file may be replaced, and a directory that has `marker` in it.
    """
    refuse_file(path.parent)
    if path.suffix in OTHER_WEIGHTS:
        raise UsageError(f"{path}: write a directory (PEFT), or a .safetensors or .pt file")
    if path.suffix not in FILE_SUFFIXES:
        refuse_existing(path, overwrite, marker)
    elif path.is_dir():
        raise UsageError(f"{path} is a directory; as a {path.suffix} it would be a file")
    elif path.exists() and not overwrite:
        raise UsageError(
            f"{path} exists already; choose another place or add --force (overwrite=True)"
        )


def with_text(prompts: str | Sequence[str]) -> list[str]:
    """One prompt or several, those without any text left out. Raises UsageError where none is."""
    given = [prompts] if isinstance(prompts, str) else prompts
    kept = [prompt for prompt in given if prompt.strip()]
    if not kept:
        raise UsageError("no prompts: there is no text in any of them")
    return kept


def draw_prompts(
    prompts: Sequence[str], draws: int, prompts_per_draw: int | None, seed: int, usual: int
) -> list[list[str]]:
    """`draws` lists of `prompts_per_draw` different prompts each; one of all prompts by default.

    Where only `draws` is given, a draw has `usual` prompts, as in training, and at most half of
    all. Draw k is the same whatever the number of draws. Raises UsageError where there are too few
    prompts for draws to differ.
    """
    if draws == 1 and prompts_per_draw is None:
        return [list(prompts)]
    size = prompts_per_draw or max(1, min(usual, len(prompts) // 2))
    if draws < 1 or not 0 < size < len(prompts):
        raise UsageError(
            f"{draws} random draws of {size} prompts each need more than {size} prompts with "
            f"text; there are {len(prompts)}"
        )
    places = range(len(prompts))
    drawn = [sorted(Random(f"draws:{seed}:{k}").sample(places, size)) for k in range(draws)]
    return [[prompts[place] for place in draw] for draw in drawn]


LINE = "line"


class Request(NamedTuple):
    """An adapter to generate."""

    name: str
    """Good for a file's name; empty where there is one adapter for all prompts."""
    prompts: list[str]


def requests(
    prompts: Sequence[str], sources: Sequence[Source], per: str | None, limit: int | None
) -> list[Request]:
    """The adapters for prompts given one by one and those of files or hub datasets.

    `per` is None (one adapter for all), "line" (one for each prompt) or a field of the rows (one
    for each of its values). `limit` keeps the first prompts. Raises UsageError where there are no
    prompts or a field does not fit them, DataError (with file:line) for bad rows.
    """
    if per is None or per == LINE:
        read = [*prompts, *(prompt for source in sources for prompt in read_prompts(source))]
        labelled = [("", prompt) for prompt in read if prompt.strip()][:limit]
    else:
        if prompts or not sources:
            raise UsageError(f"--per {per}: a field of rows; --prompt has none, give --prompt-file")
        labelled = [pair for source in sources for pair in _by_field(source, per)][:limit]
    if not labelled:
        raise UsageError("no prompts: give --prompt TEXT (repeatable) or --prompt-file FILE")
    if per is None:
        return [Request("", [prompt for _, prompt in labelled])]
    if per == LINE:
        width = max(3, len(str(len(labelled))))
        return [
            Request(f"prompt-{number:0{width}d}", [prompt])
            for number, (_, prompt) in enumerate(labelled, start=1)
        ]
    groups: dict[str, list[str]] = {}
    for label, prompt in labelled:
        groups.setdefault(label, []).append(prompt)
    names = file_names(list(groups))
    return [Request(name, group) for name, group in zip(names, groups.values(), strict=True)]


def _by_field(source: Source, field: str) -> Iterator[tuple[str, str]]:
    """(value of the field, prompt) of every row; a row of `data prepare` has several prompts."""
    if isinstance(source, Path) and source.suffix.lower() == ".txt":
        raise UsageError(f"{source}: --per {field} needs rows with fields, this is text")
    found, bad = [], []
    for line, value, problem in read_documents(source):
        try:
            if problem:
                raise DataError(problem)
            found += [(_label(value, field), prompt) for prompt in _prompts_of(value)]
        except DataError as error:
            bad.append(BadRow(line, str(error)))
    if bad:
        raise DataError(*bad_lines(source, bad, ""))
    yield from found


def _prompts_of(row: Any) -> list[str]:
    joined = row.get("prompts") if isinstance(row, dict) else None
    if isinstance(joined, list) and joined and all(isinstance(one, str) for one in joined):
        return joined
    return [question_of(row).prompt]


def _label(row: Any, field: str) -> str:
    fields = row if isinstance(row, dict) else {}
    value = fields.get(field)
    if not isinstance(value, str | int) or not str(value).strip():
        known = listing(sorted(fields)) if fields else "none"
        raise DataError(f"no text or number in the field '{field}'; its fields: {known}")
    return str(value)


def file_names(labels: Sequence[str]) -> list[str]:
    """A name for each label that every file system takes, all different whatever the case, and
    none that ends as a file of weights does: it may become a directory's."""
    seen: Counter[str] = Counter()
    names = []
    for label in labels:
        name = file_name(label, otherwise="group")
        stem, dot, ending = name.rpartition(".")
        if f"{dot}{ending.lower()}" in (*FILE_SUFFIXES, *OTHER_WEIGHTS):
            name = f"{stem}-{ending}"
        while name.casefold() in seen:
            seen[name.casefold()] += 1
            name = f"{name}-{seen[name.casefold()]}"
        seen[name.casefold()] = 1
        names.append(name)
    return names
