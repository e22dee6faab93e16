"""The requests of `gen infer`: adapters to generate, their prompts and their output paths. Light.

Mistakes are reported before torch or a generator is loaded.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from random import Random
from typing import NamedTuple

from loragen.core.adapter import refuse_existing_adapter
from loragen.core.data.dataset import BadRow, Dataset, bad_lines
from loragen.core.data.documents import DataFile, Source
from loragen.core.data.formats import question_of
from loragen.core.errors import DataError, UsageError, listing
from loragen.core.files import file_name
from loragen.core.outputs import refuse_existing_file

FILE_SUFFIXES = (".safetensors", ".pt")
OTHER_WEIGHTS = (".bin", ".ckpt", ".gguf", ".npz", ".pth")
LINE = "line"
"""The value of `--per` that gives every prompt its own adapter."""


class Request(NamedTuple):
    """An adapter to generate."""

    name: str
    """A valid file name; empty for the single adapter of all prompts."""
    prompts: list[str]


def requests(
    prompts: Sequence[str], sources: Sequence[Source], per: str | None, limit: int | None
) -> list[Request]:
    """Returns the adapters to generate from the given prompts and those of files or hub datasets.

    `per` is None (one adapter for all prompts), "line" (one for each prompt) or a field of the rows
    (one for each of its values). `limit` keeps the first prompts. Raises UsageError if there are no
    prompts or `per` does not fit them, DataError (file:line) for bad rows.
    """
    if per is None or per == LINE:
        given = [*prompts, *(prompt for source in sources for prompt in Dataset(source).prompts())]
        labelled = [("", prompt) for prompt in given if prompt.strip()][:limit]
    elif prompts or not sources:
        raise UsageError(f"--per {per}: --prompt has no fields; give rows with --prompt-file")
    else:
        labelled = [pair for source in sources for pair in _labelled_prompts(source, per)][:limit]
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


def _labelled_prompts(source: Source, field: str) -> Iterator[tuple[str, str]]:
    """Yields (value of the field, prompt) for every row; a row of `data prepare` has several
    prompts."""
    if isinstance(source, DataFile) and source.suffix == ".txt":
        raise UsageError(f"{source}: --per {field} needs rows with fields; a .txt file has none")
    found, bad = [], []
    for line, value, problem in source.documents():
        row = value if isinstance(value, dict) else {}
        label, several = row.get(field), row.get("prompts")
        try:
            if problem:
                raise DataError(problem)
            if not isinstance(label, str | int) or not str(label).strip():
                fields = listing(sorted(row))
                raise DataError(f"no text or number in the field '{field}'; its fields: {fields}")
            if isinstance(several, list) and several and all(isinstance(p, str) for p in several):
                found += [(str(label), prompt) for prompt in several]
            else:
                found.append((str(label), question_of(value).prompt))
        except DataError as error:
            bad.append(BadRow(line, str(error)))
    if bad:
        raise DataError(*bad_lines(source, bad))
    yield from found


def file_names(labels: Sequence[str]) -> list[str]:
    """Returns a valid file name for each label. The names differ by more than upper and lower case,
    and none has the suffix of a weights file, since it may name a directory."""
    seen: Counter[str] = Counter()
    names = []
    for label in labels:
        name = file_name(label, otherwise="group")
        stem, dot, suffix = name.rpartition(".")
        if f"{dot}{suffix.lower()}" in (*FILE_SUFFIXES, *OTHER_WEIGHTS):
            name = f"{stem}-{suffix}"
        while name.casefold() in seen:
            seen[name.casefold()] += 1
            name = f"{name}-{seen[name.casefold()]}"
        seen[name.casefold()] = 1
        names.append(name)
    return names


def default_output() -> Path:
    """Returns `generated/adapter-001`, or the first number that is not in use."""
    paths = (Path("generated") / f"adapter-{number:03d}" for number in count(1))
    return next(path for path in paths if not path.exists())


def output_path(output: Path, name: str, suffix: str) -> Path:
    """Returns the path of the request with this name: `output` itself for the single adapter (no
    name), else a file or directory in it.

    Raises UsageError if several adapters would be written to one file.
    """
    if not name:
        return output
    if output.suffix in FILE_SUFFIXES:
        raise UsageError(
            f"{output}: --per writes a directory; for files in it, add --format {output.suffix[1:]}"
        )
    return output / f"{name}{suffix}"


def check_output(path: Path, overwrite: bool, merged: bool = False) -> None:
    """Raises UsageError if something at `path` must not be replaced, or nothing can be written.

    With `overwrite`, what a generator has written before is replaced: a weights file, and of the
    directory of an adapter, or with `merged` of a merged model, the files that it has written.
    """
    if path.suffix in OTHER_WEIGHTS:
        raise UsageError(
            f"{path}: {path.suffix} files are not supported; name a directory (PEFT), or a "
            ".safetensors or .pt file"
        )
    if path.suffix in FILE_SUFFIXES:
        refuse_existing_file(path, overwrite, _is_generated)
    else:
        refuse_existing_adapter(path, overwrite, merged)


def _is_generated(file: Path) -> bool:
    """Returns whether a weights file is a generated adapter."""
    import torch
    from safetensors import SafetensorError, safe_open

    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as opened:
                return {"adapter_config", "generated"} <= (opened.metadata() or {}).keys()
        except (SafetensorError, OSError):
            return False

    try:
        document = torch.load(file, map_location="meta", weights_only=True)
    except Exception:  # noqa: BLE001  # of a file that is anything else, torch raises anything
        return False
    keys = {"state_dict", "adapter_config", "generated"}
    return isinstance(document, dict) and document.keys() == keys


def nonempty_prompts(prompts: str | Sequence[str]) -> list[str]:
    """Returns those of one or several prompts that have text. Raises UsageError if none has, or one
    is not a str."""
    several = [prompts] if isinstance(prompts, str) else list(prompts)
    for number, prompt in enumerate(several, start=1):
        if not isinstance(prompt, str):
            kind = type(prompt).__name__
            raise UsageError(f"prompt {number} of {len(several)} is not a string, but {kind}")
    found = [prompt for prompt in several if prompt.strip()]
    if not found:
        raise UsageError("no prompts: all of them are empty; give at least one with text")
    return found


def draw_prompts(
    prompts: Sequence[str], draws: int, prompts_per_draw: int | None, seed: int, usual: int
) -> list[list[str]]:
    """Returns `draws` random subsets of `prompts_per_draw` prompts each; by default one of all.

    If only `draws` is given, a subset has `usual` prompts, as in training, but at most half of all.
    Subset k does not depend on `draws`. Raises UsageError if there are too few prompts for the
    subsets to differ.
    """
    if draws == 1 and prompts_per_draw is None:
        return [list(prompts)]
    size = prompts_per_draw or max(1, min(usual, len(prompts) // 2))
    check_draws(len(prompts), draws, size)
    indices = range(len(prompts))
    drawn = [sorted(Random(f"draws:{seed}:{k}").sample(indices, size)) for k in range(draws)]
    return [[prompts[index] for index in draw] for draw in drawn]


def check_draws(num_prompts: int, draws: int, prompts_per_draw: int | None) -> None:
    """Raises UsageError if there are too few prompts for random draws of them to differ."""
    size = prompts_per_draw or 1
    if (draws, prompts_per_draw) != (1, None) and (draws < 1 or not 0 < size < num_prompts):
        raise UsageError(
            f"{draws} random draws of {size} prompts each need more than {size} prompts with "
            f"text; there are {num_prompts}"
        )
