"""The texts and labelled rows of a source, split into those to train on and those held out."""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from random import Random
from typing import Any

from loragen.core.data.chat import log_notes
from loragen.core.data.prompts import joined_text, text_key, whole_groups
from loragen.core.data.tokenize import Example, TokenizedRows, examples_hash
from loragen.core.errors import DataError, UsageError
from loragen.core.files import sha256_text
from loragen.core.learning.sources import TrainingSource
from loragen.core.lora.data import CHECKED
from loragen.core.lora.provenance import Provenance
from loragen.core.run.directory import checkpoint_step

NOTED_ROWS = 64  # of a dataset, which are searched for what is odd about them
MAX_ROWS = 4096  # of a dataset: it takes thousands of steps until one is seen twice
LONGEST = 16
"""Rows of a dataset that decide with those of the others whether rows are packed."""


@dataclass(frozen=True)
class Texts:
    """The texts of a source that the encoder reads, each of which joins some prompts."""

    texts: list[str]
    val_texts: list[int]
    """Indices of the texts held out for validation."""
    tracked: list[list[int]] | None = None
    """For each checkpoint the texts of its own rows; None: it is paired with any text."""

    @property
    def sha256(self) -> str:
        """A hash of the texts and of their use."""
        return sha256_text(*self.texts, repr(self.val_texts), repr(self.tracked))


def texts_of(source: TrainingSource) -> Texts:
    """Returns the source's texts, according to `data.pairing` and `data.val_ratio`.

    Raises DataError if a checkpoint is to be paired with its own rows and has none.
    """
    data, groups = source.data, source.groups
    if source.provenance is None:
        texts = [joined_text(group) for group in (*groups.train, *groups.val)]
        return Texts(texts, list(range(len(groups.train), len(texts))))
    return paired_with_rows(
        source.name,
        source.provenance,
        [checkpoint_step(file) for file in source.checkpoints],
        groups.val,
        samples_per_prompt=data.samples_per_prompt,
        max_texts=data.prompts_per_condition,
    )


def paired_with_rows(
    name: str,
    provenance: Provenance,
    steps: Sequence[int],
    val_groups: Sequence[Sequence[str]],
    *,
    samples_per_prompt: int,
    max_texts: int,
) -> Texts:
    """Pairs each checkpoint with the rows that it had just been trained on.

    These are the rows of its own step, then of the steps before, without rows of the held-out
    groups: `samples_per_prompt` to a text, up to `max_texts`. A text that several checkpoints share
    is listed once. Raises DataError for a checkpoint that has no rows left.
    """
    excluded = {text_key(prompt) for group in val_groups for prompt in group}
    of_steps = []
    for step in steps:
        prompts = last_prompts(provenance, step, samples_per_prompt * max_texts, excluded)
        if not prompts:
            raise DataError(
                f"{name}: no row up to step {step} is left to learn from; lower data.val_ratio"
            )
        groups = whole_groups(prompts, samples_per_prompt) or [tuple(prompts)]
        of_steps.append([joined_text(group) for group in groups])
    distinct = dict.fromkeys(text for texts in of_steps for text in texts)
    index = {text: i for i, text in enumerate(distinct)}
    texts = [*index, *map(joined_text, val_groups)]
    tracked = [[index[text] for text in texts_of_step] for texts_of_step in of_steps]
    return Texts(texts, list(range(len(index), len(texts))), tracked)


def last_prompts(
    provenance: Provenance, step: int, count: int, excluded: Set[str] = frozenset()
) -> list[str]:
    """Returns up to `count` different prompts: those of the rows of `step` (counted from 1), then
    of the step before, and so on. `excluded` are text keys."""
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
    """Rows of one dataset, tokenised when they are used. No prompt of a validation row is among
    those to learn from."""

    training: Sequence[Example]
    validation: Sequence[Example]
    longest: Sequence[Example]
    """Those of all rows that have the most characters."""

    @property
    def sha256(self) -> str:
        """A hash of the first tokens, enough to notice another tokenizer or other rows."""
        parts = self.training[:CHECKED], self.validation[:CHECKED]
        return sha256_text(*map(examples_hash, parts))


def labelled_rows(
    source: TrainingSource, val_prompts: Sequence[str], tokenizer: Any, max_length: int, seed: int
) -> LabelledRows:
    """Returns a random sample of the source's rows; those of `val_prompts` are held out.

    Raises UsageError if the source has no labelled rows or none is left to learn from.
    """
    labels = source.labels
    if labels is None:
        raise UsageError(
            f"{source.name}: its labelled rows are unknown, since its checkpoints are of no run "
            "with a dataset; set training.objective=reconstruction"
        )
    if labels.is_missing:
        raise UsageError(f"{source.name}: its dataset {labels} is missing; its labels are needed")
    drawn = Random(f"rows:{seed}").sample(labels.good_rows, min(MAX_ROWS, len(labels.good_rows)))
    rows = TokenizedRows(drawn, tokenizer, max_length)  # the others do not train an adapter, either
    if not rows:
        reason = rows.left_out[0].reason
        if "max_length" in reason:
            reason = f"no answer fits into {max_length} tokens; raise behaviour.max_length"
        raise UsageError(f"{source.name}: {reason}")
    log_notes(tokenizer, rows.rows[:NOTED_ROWS], labels.source)
    held = {text_key(prompt) for prompt in val_prompts}
    is_held = [text_key(row.prompt) in held for row in rows.rows]
    training, validation = (
        rows.subset([i for i, this in enumerate(is_held) if this == wanted])
        for wanted in (False, True)
    )
    if not training:
        raise UsageError(f"{source.name}: no row is left to learn from; lower data.val_ratio")
    longest = [rows[i] for i in rows.longest(range(len(rows)), LONGEST)]
    return LabelledRows(training, validation, longest)
