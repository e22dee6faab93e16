"""Prompts without labels: read from any file, and joined into the texts a generator sees."""

from collections.abc import Sequence
from random import Random
from typing import Any

from loragen.core.data.dataset import Dataset
from loragen.core.data.documents import Source


def read_prompts(source: Source) -> list[str]:
    """Deprecated: `Dataset.prompts`."""
    return Dataset(source).prompts()


def prompts_of_rows(source: Source, skip_bad_rows: bool = False) -> list[str]:
    """Deprecated: `Dataset.prompts`."""
    return Dataset(source).prompts(skip_bad_rows, of_rows=True)


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
