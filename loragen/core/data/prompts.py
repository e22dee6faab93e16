"""Prompts without labels: read from any file, and joined into the texts a generator sees."""

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from loragen.core.data.rows import read_documents, utf8_text
from loragen.core.errors import DataError, UsageError, listing


def read_prompts(file: Path) -> list[str]:
    """The prompts of a .txt (one a line), .jsonl or .json file (text, or objects with a `prompt`).

    Raises UsageError for a missing file, DataError (with file:line) for one that is malformed.
    """
    if not file.is_file():
        raise UsageError(f"{file}: no such prompt file")
    if file.suffix in {".jsonl", ".json"}:
        prompts = [_prompt(file, line, document) for line, document in read_documents(file)]
    else:
        prompts = [line.strip() for line in utf8_text(file).split("\n")]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise DataError(f"{file}: no prompts in it")
    return prompts


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


def _prompt(file: Path, line: int, document: Any) -> str:
    if isinstance(document, str):
        return document
    if isinstance(document, dict) and isinstance(document.get("prompt"), str):
        return str(document["prompt"])
    found = f"keys {listing(list(document))}" if isinstance(document, dict) else repr(document)[:60]
    raise DataError(f"{file}:{line}: expected a text or an object with a 'prompt', found {found}")
