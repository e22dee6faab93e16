"""The labelled rows behind a source, in tokens: what the behaviour of an adapter is judged on."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from loragen.core.data.documents import parsed_source
from loragen.core.data.prompts import same_text
from loragen.core.data.rows import read
from loragen.core.data.tokenize import Example, examples_hash, in_parts, learned
from loragen.core.errors import DataError, LoragenError, UsageError
from loragen.core.files import sha256_text
from loragen.core.generator.collections.sources import Collection

log = logging.getLogger(__name__)

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
    source: Collection, validation: Sequence[str], tokenizer: Any, max_length: int, seed: int
) -> LabelledRows:
    """Rows whose prompt is in one of the `validation` texts are held out.

    Raises UsageError where the source has no labelled rows or none is left to learn from.
    """
    examples: list[tuple[str, Example]] = []
    rows = read(parsed_source(_file_of(source))).rows
    for row in Random(f"rows:{seed}").sample(rows, min(MOST_ROWS, len(rows))):
        try:
            parts = in_parts(tokenizer, row, max_length)
        except DataError:  # an answer that does not fit, as in the training of the adapter
            continue
        examples.append((same_text(row.prompt), learned(parts)))
    if not examples:
        raise UsageError(
            f"{source.name}: no answer fits into {max_length} tokens; raise behaviour.max_length"
        )
    held = {same_text(prompt) for prompt in validation}
    training = [example for prompt, example in examples if prompt not in held]
    if not training:
        raise UsageError(f"{source.name}: no row is left to learn from; lower data.val_ratio")
    return LabelledRows(training, [example for prompt, example in examples if prompt in held])


def has_rows(source: Collection) -> bool:
    """Whether labels are at hand: a file that is there, with answers in it."""
    try:
        return bool(read(parsed_source(_file_of(source))).rows)
    except LoragenError:
        return False


def _file_of(source: Collection) -> str:
    if not source.rows:
        raise UsageError(
            f"{source.name}: no labelled rows are known of it (behaviour needs the dataset that "
            "its run was trained on); set training.objective=reconstruction"
        )
    file = parsed_source(source.rows)
    if isinstance(file, Path) and not file.is_file():
        raise UsageError(f"{source.name}: its dataset {file} is gone; behaviour needs its labels")
    return source.rows
