"""Random draws of prompts: an adapter is made of each, and their mean is taken."""

from collections.abc import Sequence
from random import Random

from loragen.core.errors import UsageError


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
