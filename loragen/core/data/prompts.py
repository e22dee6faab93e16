"""Prompts without labels: read from any file, and joined into the texts a generator sees."""

from collections.abc import Sequence
from pathlib import Path
from random import Random

from loragen.core.data.documents import SUFFIXES, Source, read_documents, utf8_text
from loragen.core.data.formats import question_of
from loragen.core.data.rows import BadRow, bad_lines
from loragen.core.errors import DataError, UsageError

TEXT_HINT = " (text, a prompt a line, is a .txt)"


def read_prompts(source: Source) -> list[str]:
    """The prompts of a .txt (one a line), or of texts, rows and rows without a label in any other
    file or a hub dataset. Labels are not read.

    Raises UsageError for a missing file, DataError (with file:line) for one that is malformed.
    """
    if isinstance(source, Path) and not source.is_file():
        raise UsageError(f"{source}: no such prompt file")
    if isinstance(source, Path) and source.suffix.lower() == ".txt":
        return _with_text(source, [line.strip() for line in utf8_text(source).split("\n")])
    return prompts_of_rows(source)


def prompts_of_rows(source: Source, skip_bad_rows: bool = False) -> list[str]:
    """The prompts of what training reads as rows, whatever the name of the file; labels, where
    there are any, are not read. Raises as `read_prompts`."""
    prompts, bad = _prompts_and_bad_rows(source)
    if bad and not (skip_bad_rows and any(prompts)):
        unknown = isinstance(source, Path) and source.suffix.lower() not in SUFFIXES
        raise DataError(*bad_lines(source, bad, TEXT_HINT if unknown else ""))
    return _with_text(source, prompts)


def joined(prompts: Sequence[str], samples_per_prompt: int) -> list[str]:
    """Prompts in their order, `samples_per_prompt` to a text; the last text may have fewer."""
    starts = range(0, len(prompts), samples_per_prompt)
    return ["\n\n".join(prompts[start : start + samples_per_prompt]) for start in starts]


def grouped(prompts: Sequence[str], samples_per_prompt: int, seed: int) -> list[str]:
    """Non-overlapping random groups, as training sees them: no prompt is in two texts, and every
    text has `samples_per_prompt` (a rest too small for a group is left out, unless it is all)."""
    shuffled = list(prompts)
    Random(f"groups:{seed}").shuffle(shuffled)
    texts = joined(shuffled, samples_per_prompt)
    whole = len(prompts) // samples_per_prompt
    return texts[:whole] if whole else texts


def _with_text(source: Source, prompts: Sequence[str]) -> list[str]:
    found = [prompt for prompt in prompts if prompt]
    if not found:
        raise DataError(f"{source}: no prompts in it")
    return found


def _prompts_and_bad_rows(source: Source) -> tuple[list[str], list[BadRow]]:
    prompts, bad = [], []
    for line, value, problem in read_documents(source):
        try:
            if problem:
                raise DataError(problem)
            prompts.append(question_of(value).prompt)
        except DataError as error:
            bad.append(BadRow(line, str(error)))
    return prompts, bad
