"""The prompt texts of a source: which are held out, and which go with which checkpoint. Light."""

from collections.abc import Sequence, Set
from dataclasses import dataclass

from loragen.core.data.batches import held_out
from loragen.core.data.prepare import Groups
from loragen.core.data.prompts import random_groups, same_text, text_of, whole_groups
from loragen.core.errors import DataError
from loragen.core.files import sha256_text
from loragen.core.lora.provenance import Provenance


@dataclass(frozen=True)
class Texts:
    """What the encoder reads of a source. Indices are of `texts`."""

    texts: list[str]
    held_out: list[int]
    """Those that validate."""
    tracked: list[list[int]] | None = None
    """For each checkpoint the texts of its own rows; None where any text goes with any."""

    @property
    def sha256(self) -> str:
        """Of the texts, and of what they are for."""
        return sha256_text(*self.texts, repr(self.held_out), repr(self.tracked))


def held_out_texts(texts: int, ratio: float, seed: int) -> tuple[list[int], list[int]]:
    """(training, validation) indices. At least one text is left to train on; a single one
    validates on none."""
    return held_out(texts, min(ratio, (texts - 1) / texts), seed)


def split_groups(
    prompts: Sequence[str], samples_per_prompt: int, ratio: float, seed: int
) -> Groups:
    """Random groups of prompts that nobody has prepared, split as their texts are. A prompt that
    comes again says nothing new, and might be seen on both sides: it is left out."""
    distinct = list({same_text(prompt): prompt for prompt in reversed(prompts)}.values())[::-1]
    groups = random_groups(distinct, samples_per_prompt, seed)
    training, validation = held_out_texts(len(groups), ratio, seed)
    return Groups([groups[i] for i in training], [groups[i] for i in validation])


def paired_with_dataset(groups: Groups) -> Texts:
    """Any text that is not held out goes with any checkpoint."""
    texts = [text_of(group) for group in (*groups.train, *groups.val)]
    return Texts(texts, list(range(len(groups.train), len(texts))))


def paired_with_rows(
    name: str,
    provenance: Provenance,
    steps: Sequence[int],
    held_out: Sequence[Sequence[str]],
    *,
    samples_per_prompt: int,
    most_texts: int,
) -> Texts:
    """A checkpoint goes with the rows that it had just been trained on, `samples_per_prompt` to a
    text, up to `most_texts` of them: those of its own step, then of the steps just before.

    Rows of the groups held out are passed over. A text that several checkpoints share is there
    once. Raises DataError for a checkpoint that has no rows left.
    """
    excluded = {same_text(prompt) for group in held_out for prompt in group}
    of_steps = []
    for step in steps:
        prompts = last_prompts(provenance, step, samples_per_prompt * most_texts, excluded)
        if not prompts:
            raise DataError(
                f"{name}: no row up to step {step} is left to learn from; lower data.val_ratio"
            )
        groups = whole_groups(prompts, samples_per_prompt) or [tuple(prompts)]
        of_steps.append([text_of(group) for group in groups])
    index = {
        text: i for i, text in enumerate(dict.fromkeys(t for texts in of_steps for t in texts))
    }
    texts = [*index, *map(text_of, held_out)]
    tracked = [[index[text] for text in texts] for texts in of_steps]
    return Texts(texts, list(range(len(index), len(texts))), tracked)


def last_prompts(
    provenance: Provenance, step: int, count: int, excluded: Set[str] = frozenset()
) -> list[str]:
    """The prompts of the rows of `step`, then of the step before, ...: `count` different ones, or
    all that there are."""
    found: dict[str, str] = {}
    for earlier in range(step, 0, -1):
        for row in provenance.rows_of(earlier):
            same = same_text(row.prompt)
            if same and same not in excluded:
                found.setdefault(same, row.prompt)
            if len(found) == count:
                return list(found.values())
    return list(found.values())
