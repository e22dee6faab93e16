"""Prompts without labels: read from any file, and joined into the texts a generator sees."""

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from loragen.core.data.documents import SUFFIXES, Source, read_documents, utf8_text
from loragen.core.data.formats import question_of, texts
from loragen.core.data.rows import BadRow, bad_lines
from loragen.core.errors import DataError, UsageError
from loragen.core.files import absent

TEXT_HINT = " (text, a prompt a line, is a .txt)"
PREPARED_KEYS = ("prompt", "prompts", "dataset", "lines")
"""Of a line of `data prepare`, which holds several prompts (`core.data.prepare`)."""


class Prompt(NamedTuple):
    line: int
    text: str


def read_prompts(source: Source) -> list[str]:
    """The prompts of a .txt (one a line), or of texts, rows and rows without a label in any other
    file or a hub dataset. Labels are not read. A file of `data prepare` has all that were joined,
    in their order: joining as many again gives the same texts.

    Raises UsageError for a missing file, DataError (with file:line) for one that is malformed.
    """
    return _texts(source, *numbered_prompts(source))


def numbered_prompts(source: Source) -> tuple[list[Prompt], list[BadRow]]:
    """As `read_prompts`, each prompt with its line; bad rows apart, and no error."""
    if isinstance(source, Path) and not source.is_file():
        raise UsageError(absent(source, "prompt file"))
    if isinstance(source, Path) and source.suffix.lower() == ".txt":
        lines = enumerate(utf8_text(source).split("\n"), start=1)
        return [Prompt(line, text.strip()) for line, text in lines if text.strip()], []
    return _prompts_and_bad_rows(source)


def prompts_of_rows(source: Source, skip_bad_rows: bool = False) -> list[str]:
    """The prompts of what training reads as rows, whatever the name of the file; labels, where
    there are any, are not read. Raises as `read_prompts`."""
    return _texts(source, *_prompts_and_bad_rows(source), skip_bad_rows)


def same_text(prompt: str) -> str:
    """What two prompts have in common that say the same: white space is no difference."""
    return " ".join(prompt.split())


def text_of(prompts: Sequence[str]) -> str:
    """Several prompts as one text."""
    return "\n\n".join(prompts)


def joined(prompts: Sequence[str], samples_per_prompt: int) -> list[str]:
    """Prompts in their order, `samples_per_prompt` to a text; the last text may have fewer."""
    starts = range(0, len(prompts), samples_per_prompt)
    return [text_of(prompts[start : start + samples_per_prompt]) for start in starts]


def random_groups(
    prompts: Sequence[str], samples_per_prompt: int, seed: int
) -> list[tuple[str, ...]]:
    """Non-overlapping, as training sees them: no prompt is in two groups, and every group has
    `samples_per_prompt` (a rest too small for a group is left out, unless it is all)."""
    shuffled = list(prompts)
    Random(f"groups:{seed}").shuffle(shuffled)
    rest = [tuple(shuffled)] if shuffled else []
    return whole_groups(shuffled, samples_per_prompt) or rest


def whole_groups(prompts: Sequence[Any], size: int) -> list[tuple[Any, ...]]:
    """Cut in their order; a rest too small for a group is left out."""
    ends = range(size, len(prompts) + 1, size)
    return [tuple(prompts[end - size : end]) for end in ends]


def _texts(
    source: Source, prompts: Sequence[Prompt], bad: Sequence[BadRow], skip_bad_rows: bool = False
) -> list[str]:
    if bad and not (skip_bad_rows and prompts):
        unknown = isinstance(source, Path) and source.suffix.lower() not in SUFFIXES
        raise DataError(*bad_lines(source, bad, TEXT_HINT if unknown else ""))
    if not prompts:
        raise DataError(f"{source}: no prompts in it")
    return [prompt.text for prompt in prompts]


def _prompts_and_bad_rows(source: Source) -> tuple[list[Prompt], list[BadRow]]:
    prompts: list[Prompt] = []
    bad: list[BadRow] = []
    for line, value, problem in read_documents(source):
        try:
            if problem:
                raise DataError(problem)
            prompts += [Prompt(line, text) for text in _texts_of(value) if text]
        except DataError as error:
            bad.append(BadRow(line, str(error)))
    return prompts, bad


def _texts_of(document: Any) -> list[str]:
    if isinstance(document, dict) and all(key in document for key in PREPARED_KEYS):
        return texts(document["prompts"], "prompts")
    return [question_of(document).prompt]
