"""Which adapters are asked for: one for all prompts, one for each, or one for each group of rows.

Read without torch, so that mistakes are told before anything is loaded.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from loragen.core.data.documents import Source, read_documents
from loragen.core.data.formats import question_of
from loragen.core.data.prompts import read_prompts
from loragen.core.data.rows import BadRow, bad_lines
from loragen.core.errors import DataError, UsageError, listing
from loragen.core.files import file_name
from loragen.core.generator.inference.outputs import FILE_SUFFIXES, OTHER_WEIGHTS

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
