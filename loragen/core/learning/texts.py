"""The prompt texts of a source: which are held out, and which go with which checkpoint. Light.

The labelled rows behind a source, in tokens: what the behaviour of an adapter is judged on.
"""

import logging
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from loragen.core.config.schema import GenTrainConfig
from loragen.core.data.batches import held_out
from loragen.core.data.dataset import Dataset
from loragen.core.data.documents import parsed_source
from loragen.core.data.prompts import (
    PromptGroups,
    joined_text,
    random_groups,
    text_key,
    whole_groups,
)
from loragen.core.data.tokenize import Example, examples_hash, tokenize_row
from loragen.core.errors import DataError, LoragenError, UsageError
from loragen.core.files import sha256_text
from loragen.core.learning.sources import TrainingSource
from loragen.core.lora.provenance import Provenance
from loragen.core.run.directory import checkpoint_step

log = logging.getLogger(__name__)


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
) -> PromptGroups:
    """Random groups of prompts that nobody has prepared, split as their texts are. A prompt that
    comes again says nothing new, and might be seen on both sides: it is left out."""
    distinct = list({text_key(prompt): prompt for prompt in reversed(prompts)}.values())[::-1]
    groups = random_groups(distinct, samples_per_prompt, seed)
    training, validation = held_out_texts(len(groups), ratio, seed)
    return PromptGroups([groups[i] for i in training], [groups[i] for i in validation])


def paired_with_dataset(groups: PromptGroups) -> Texts:
    """Any text that is not held out goes with any checkpoint."""
    texts = [joined_text(group) for group in (*groups.train, *groups.val)]
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
    excluded = {text_key(prompt) for group in held_out for prompt in group}
    of_steps = []
    for step in steps:
        prompts = last_prompts(provenance, step, samples_per_prompt * most_texts, excluded)
        if not prompts:
            raise DataError(
                f"{name}: no row up to step {step} is left to learn from; lower data.val_ratio"
            )
        groups = whole_groups(prompts, samples_per_prompt) or [tuple(prompts)]
        of_steps.append([joined_text(group) for group in groups])
    index = {
        text: i for i, text in enumerate(dict.fromkeys(t for texts in of_steps for t in texts))
    }
    texts = [*index, *map(joined_text, held_out)]
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
            same = text_key(row.prompt)
            if same and same not in excluded:
                found.setdefault(same, row.prompt)
            if len(found) == count:
                return list(found.values())
    return list(found.values())


MOST_ROWS = 4096  # of a dataset: thousands of steps away from being seen twice


@dataclass(frozen=True)
class LabelledRows:
    """Rows of one dataset. None of a prompt that validates is among those to learn from."""

    training: list[Example]
    held_out: list[Example]

    @property
    def sha256(self) -> str:
        """Of the rows in tokens, and of what they are for."""
        return sha256_text(examples_hash(self.training), examples_hash(self.held_out))


def labelled_rows(
    source: TrainingSource, validation: Sequence[str], tokenizer: Any, max_length: int, seed: int
) -> LabelledRows:
    """Rows whose prompt is in one of the `validation` texts are held out.

    Raises UsageError where the source has no labelled rows or none is left to learn from.
    """
    examples: list[tuple[str, Example]] = []
    rows = Dataset.at(_file_of(source)).good_rows
    for row in Random(f"rows:{seed}").sample(rows, min(MOST_ROWS, len(rows))):
        try:
            parts = tokenize_row(tokenizer, row, max_length)
        except DataError:  # an answer that does not fit, as in the training of the adapter
            continue
        examples.append((text_key(row.prompt), parts.example))
    if not examples:
        raise UsageError(
            f"{source.name}: no answer fits into {max_length} tokens; raise behaviour.max_length"
        )
    held = {text_key(prompt) for prompt in validation}
    training = [example for prompt, example in examples if prompt not in held]
    if not training:
        raise UsageError(f"{source.name}: no row is left to learn from; lower data.val_ratio")
    return LabelledRows(training, [example for prompt, example in examples if prompt in held])


def has_rows(source: TrainingSource) -> bool:
    """Whether labels are at hand: a file that is there, with answers in it."""
    try:
        return bool(Dataset.at(_file_of(source)).good_rows)
    except LoragenError:
        return False


def _file_of(source: TrainingSource) -> str:
    if not source.rows:
        raise UsageError(
            f"{source.name}: no labelled rows are known of it (behaviour needs the dataset that "
            "its run was trained on); set training.objective=reconstruction"
        )
    file = parsed_source(source.rows)
    if isinstance(file, Path) and not file.is_file():
        raise UsageError(f"{source.name}: its dataset {file} is gone; behaviour needs its labels")
    return source.rows


def texts_of(source: TrainingSource, config: GenTrainConfig) -> Texts:
    """The source's texts, as `data.pairing` and `data.val_ratio` have them."""
    data, groups = config.data, groups_of(source, config)
    if source.provenance is None:
        return paired_with_dataset(groups)
    return paired_with_rows(
        source.name,
        source.provenance,
        [checkpoint_step(file) for file in source.checkpoints],
        groups.val,
        samples_per_prompt=data.samples_per_prompt,
        most_texts=data.prompts_per_condition,
    )


def groups_of(source: TrainingSource, config: GenTrainConfig) -> PromptGroups:
    """The source's prompts as they are joined and split."""
    data = config.data
    return source.groups or split_groups(
        source.prompts, data.samples_per_prompt, data.val_ratio, config.seed
    )
