"""The texts and labelled rows of a source: which train, and which are held out."""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from loragen.core.config.schema import GenTrainConfig
from loragen.core.data.batches import held_out
from loragen.core.data.prompts import (
    PromptGroups,
    joined_text,
    random_groups,
    text_key,
    whole_groups,
)
from loragen.core.data.tokenize import Example, examples_hash, tokenize_row
from loragen.core.errors import DataError, UsageError
from loragen.core.files import sha256_text
from loragen.core.learning.sources import TrainingSource
from loragen.core.lora.provenance import Provenance
from loragen.core.run.directory import checkpoint_step

MOST_ROWS = 4096  # of a dataset: thousands of steps before one is seen twice


@dataclass(frozen=True)
class Texts:
    """The texts of a source that the encoder reads: some prompts each, joined."""

    texts: list[str]
    held_out: list[int]
    """Indices of the texts that validate."""
    tracked: list[list[int]] | None = None
    """For each checkpoint the texts of its own rows; None where any text goes with any."""

    @property
    def sha256(self) -> str:
        """A hash of the texts and of their use."""
        return sha256_text(*self.texts, repr(self.held_out), repr(self.tracked))


def texts_of(source: TrainingSource, config: GenTrainConfig) -> Texts:
    """Returns the source's texts, according to `data.pairing` and `data.val_ratio`.

    Raises DataError for a checkpoint without rows of its own, where it is paired with those.
    """
    data, groups = config.data, groups_of(source, config)
    if source.provenance is None:
        texts = [joined_text(group) for group in (*groups.train, *groups.val)]
        return Texts(texts, list(range(len(groups.train), len(texts))))
    return paired_with_rows(
        source.name,
        source.provenance,
        [checkpoint_step(file) for file in source.checkpoints],
        groups.val,
        samples_per_prompt=data.samples_per_prompt,
        most_texts=data.prompts_per_condition,
    )


def groups_of(source: TrainingSource, config: GenTrainConfig) -> PromptGroups:
    """Returns the source's prompts in groups, split into training and validation."""
    data = config.data
    return source.groups or split_groups(
        source.prompts, data.samples_per_prompt, data.val_ratio, config.seed
    )


def split_groups(
    prompts: Sequence[str], samples_per_prompt: int, ratio: float, seed: int
) -> PromptGroups:
    """Returns random groups of prompts, split by `ratio`; at least one group is left to train on.

    Repeated prompts are dropped, as one might be on both sides.
    """
    distinct = list({text_key(prompt): prompt for prompt in reversed(prompts)}.values())[::-1]
    groups = random_groups(distinct, samples_per_prompt, seed)
    most = (len(groups) - 1) / len(groups)
    training, validation = held_out(len(groups), min(ratio, most), seed)
    return PromptGroups([groups[i] for i in training], [groups[i] for i in validation])


def paired_with_rows(
    name: str,
    provenance: Provenance,
    steps: Sequence[int],
    held_out_groups: Sequence[Sequence[str]],
    *,
    samples_per_prompt: int,
    most_texts: int,
) -> Texts:
    """Pairs each checkpoint with the rows that it had just been trained on.

    They are those of its own step, then of the steps before, `samples_per_prompt` to a text, up to
    `most_texts`, without rows of the held-out groups. A text that several checkpoints share is
    there once. Raises DataError for a checkpoint that has no rows left.
    """
    excluded = {text_key(prompt) for group in held_out_groups for prompt in group}
    of_steps = []
    for step in steps:
        prompts = last_prompts(provenance, step, samples_per_prompt * most_texts, excluded)
        if not prompts:
            raise DataError(
                f"{name}: no row up to step {step} is left to learn from; lower data.val_ratio"
            )
        groups = whole_groups(prompts, samples_per_prompt) or [tuple(prompts)]
        of_steps.append([joined_text(group) for group in groups])
    distinct = dict.fromkeys(text for texts in of_steps for text in texts)
    index = {text: i for i, text in enumerate(distinct)}
    texts = [*index, *map(joined_text, held_out_groups)]
    tracked = [[index[text] for text in texts_of_step] for texts_of_step in of_steps]
    return Texts(texts, list(range(len(index), len(texts))), tracked)


def last_prompts(
    provenance: Provenance, step: int, count: int, excluded: Set[str] = frozenset()
) -> list[str]:
    """Returns `count` different prompts, or all there are: of the rows of `step`, then of the step
    before, and so on. `excluded` are text keys."""
    found: dict[str, str] = {}
    for earlier in range(step, 0, -1):
        for row in provenance.rows_of(earlier):
            key = text_key(row.prompt)
            if key and key not in excluded:
                found.setdefault(key, row.prompt)
            if len(found) == count:
                return list(found.values())
    return list(found.values())


@dataclass(frozen=True)
class LabelledRows:
    """Rows of one dataset in tokens. No prompt of a held-out row is among those to learn from."""

    training: list[Example]
    held_out: list[Example]

    @property
    def sha256(self) -> str:
        """A hash of the tokens and of their use."""
        return sha256_text(examples_hash(self.training), examples_hash(self.held_out))


def labelled_rows(
    source: TrainingSource, validation: Sequence[str], tokenizer: Any, max_length: int, seed: int
) -> LabelledRows:
    """Returns a sample of the source's rows in tokens; those of `validation` prompts are held out.

    Raises UsageError where the source has no labelled rows or none is left to learn from.
    """
    labels = source.labels
    if labels is None:
        raise UsageError(
            f"{source.name}: its labelled rows are unknown, since its checkpoints are of no run "
            "with a dataset; set training.objective=reconstruction"
        )
    if isinstance(labels.source, Path) and not labels.source.is_file():
        raise UsageError(f"{source.name}: its dataset {labels} is missing; its labels are needed")
    examples: list[tuple[str, Example]] = []
    rows = labels.good_rows
    for row in Random(f"rows:{seed}").sample(rows, min(MOST_ROWS, len(rows))):
        try:
            tokens = tokenize_row(tokenizer, row, max_length)
        except DataError:  # an answer that does not fit, as in the training of the adapter
            continue
        examples.append((text_key(row.prompt), tokens.example))
    if not examples:
        raise UsageError(
            f"{source.name}: no answer fits into {max_length} tokens; raise behaviour.max_length"
        )
    held = {text_key(prompt) for prompt in validation}
    training = [example for prompt, example in examples if prompt not in held]
    if not training:
        raise UsageError(f"{source.name}: no row is left to learn from; lower data.val_ratio")
    return LabelledRows(training, [example for prompt, example in examples if prompt in held])
