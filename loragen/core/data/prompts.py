"""Prompts as the texts that a generator reads: joined in groups, held out, and prepared on disk.

`data prepare` writes a directory of `train_prompts.jsonl`, `val_prompts.jsonl` and `prepared.json`,
which records their options and datasets; several datasets may share it.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from loragen.core.contents import read_json, record_of
from loragen.core.data.dataset import Dataset, Prompt
from loragen.core.data.documents import DataFile
from loragen.core.errors import DataError, UsageError, did_you_mean, listing
from loragen.core.files import write_json, write_text
from loragen.core.outputs import (
    Record,
    check_writable,
    hashes,
    recorded_in_json,
    refuse_existing,
    refuse_file,
    refuse_input,
    written_directory,
)

FORMAT_VERSION = 1
TRAIN, VAL, RECORD = "train_prompts.jsonl", "val_prompts.jsonl", "prepared.json"


def joined_text(prompts: Sequence[str]) -> str:
    """Returns several prompts as one text."""
    return "\n\n".join(prompts)


def joined_texts(prompts: Sequence[str], samples_per_prompt: int) -> list[str]:
    """Joins prompts in their order, `samples_per_prompt` to a text; the last may have fewer."""
    starts = range(0, len(prompts), samples_per_prompt)
    return [joined_text(prompts[start : start + samples_per_prompt]) for start in starts]


def random_groups(
    prompts: Sequence[str], samples_per_prompt: int, seed: int
) -> list[tuple[str, ...]]:
    """Returns disjoint random groups of `samples_per_prompt` prompts each. A rest that is too small
    for a group is left out, unless there is no group without it."""
    shuffled = list(prompts)
    Random(f"groups:{seed}").shuffle(shuffled)
    rest = [tuple(shuffled)] if shuffled else []
    return whole_groups(shuffled, samples_per_prompt) or rest


def whole_groups(prompts: Sequence[Any], size: int) -> list[tuple[Any, ...]]:
    """Cuts prompts in their order into groups; a rest too small for a group is left out."""
    ends = range(size, len(prompts) + 1, size)
    return [tuple(prompts[end - size : end]) for end in ends]


def text_key(prompt: str) -> str:
    """Returns a key that is equal for prompts that differ in white space alone."""
    return " ".join(prompt.split())


class PreparedText(BaseModel):
    """A line of the prepared files: some prompts, and the one text that a generator reads."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str
    """`prompts`, joined."""
    prompts: list[str] = Field(min_length=1)
    dataset: str
    lines: list[int]
    """The lines of `prompts` in the dataset's file, counted from 1."""


class PreparedDataset(BaseModel):
    """The numbers of prompts of one dataset that were used and left out."""

    dataset: str
    path: str
    sha256: str
    bad_rows: int
    prompts: int
    repeated: int
    """Prompts left out because an earlier one has the same text."""
    left_over: int
    """Prompts left out because they are too few for a text."""
    train: int
    """Texts to train on."""
    val: int
    """Texts held out."""


class Grouping(BaseModel):
    """The options by which prompts are joined and split."""

    samples_per_prompt: int = Field(4, ge=1)
    test_ratio: float = Field(0.1, ge=0, lt=1)
    seed: int = 42


class PreparedRecord(Grouping):
    """The content of prepared.json."""

    format_version: int = FORMAT_VERSION
    kind: Literal["prompts"] = "prompts"
    datasets: list[PreparedDataset]
    files: dict[str, str] = {}
    """The hashes of the other two files."""


@dataclass(frozen=True)
class PromptSplit:
    """Groups of prompts with their lines, and the numbers of prompts that are in no group."""

    train: list[tuple[Prompt, ...]]
    val: list[tuple[Prompt, ...]]
    repeated: int
    left_over: int


@dataclass(frozen=True)
class PromptGroups:
    """Groups of prompts, each joined to one text: `train` to train on, `val` held out."""

    train: list[tuple[str, ...]]
    val: list[tuple[str, ...]]


def prepare(
    datasets: Sequence[Dataset],
    directory: Path,
    grouping: Grouping,
    skip_bad_rows: bool = False,
    force: bool = False,
) -> PreparedRecord:
    """Writes the directory's three files. The same datasets and grouping give the same bytes.

    Raises UsageError for files that exist already (without `force`), missing datasets, or two of
    one name; DataError for bad rows (unless skipped) or too few prompts.
    """
    refuse_file(directory)
    for name in (TRAIN, VAL, RECORD):
        refuse_input(directory / name, [dataset.source for dataset in datasets])
    existing = [name for name in (RECORD, TRAIN, VAL) if (directory / name).exists()]
    if existing and not force:  # other files in the directory do not matter
        raise UsageError(
            f"{directory} has {listing(existing)} already; choose another directory or add --force"
        )
    if existing:
        refuse_existing(directory, force, prepared_record, (TRAIN, VAL))
    check_writable(directory)
    names = [dataset.name for dataset in datasets]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two datasets are called {name}; rename one of the files")
    sides: dict[str, str] = {}
    texts: dict[str, list[PreparedText]] = {TRAIN: [], VAL: []}
    record = PreparedRecord(**grouping.model_dump(), datasets=[])
    for dataset in datasets:
        prompts, bad_rows = dataset.numbered_prompts(skip_bad_rows)
        split = split_prompts(prompts, dataset.name, grouping, sides)
        if not prompts:
            raise DataError(f"{dataset}: no prompts in it")
        if not split.train:
            raise DataError(
                f"{dataset}: {len(prompts) - split.repeated} different prompts are too few for a "
                f"text of {grouping.samples_per_prompt} to train on; lower --samples-per-prompt"
            )
        for file, groups in ((TRAIN, split.train), (VAL, split.val)):
            texts[file] += [
                PreparedText(
                    prompt=joined_text([prompt.text for prompt in group]),
                    prompts=[prompt.text for prompt in group],
                    dataset=dataset.name,
                    lines=[prompt.line for prompt in group],
                )
                for group in groups
            ]
        record.datasets.append(
            PreparedDataset(
                dataset=dataset.name,
                path=dataset.location,
                sha256=dataset.sha256,
                bad_rows=bad_rows,
                prompts=len(prompts),
                repeated=split.repeated,
                left_over=split.left_over,
                train=len(split.train),
                val=len(split.val),
            )
        )
    with written_directory(directory, prepared_record) as temporary:
        for file, lines in texts.items():
            rows = (json.dumps(line.model_dump(), ensure_ascii=False) for line in lines)
            write_text(temporary / file, "".join(f"{row}\n" for row in rows))
        record.files = hashes(temporary)
        write_json(temporary / RECORD, record.model_dump())
    return record


def prepared_record(directory: Path) -> Record | None:
    """Returns the record of the prepared prompts that a directory holds."""
    return recorded_in_json(directory, RECORD)


def split_prompts(
    prompts: Sequence[Prompt], name: str, grouping: Grouping, sides: dict[str, str]
) -> PromptSplit:
    """Returns random groups that share no prompt.

    A prompt with the text of an earlier one (white space aside) is left out: without its label it
    adds nothing, and in the other part of the split it would leak. `sides` records the part of each
    text, so that a text of several datasets is in the same part for all.
    """
    distinct = list({text_key(prompt.text): prompt for prompt in reversed(prompts)}.values())
    random = Random(f"prepare:{grouping.seed}:{name}")
    random.shuffle(distinct)
    size = grouping.samples_per_prompt
    texts, held_out = len(distinct) // size, 0
    if grouping.test_ratio and texts > 1:  # at least one text on either side
        held_out = min(texts - 1, max(1, round(texts * grouping.test_ratio))) * size
    by_side = defaultdict(list)
    for prompt in distinct:
        by_side[sides.get(text_key(prompt.text), "")].append(prompt)
    free = by_side[""]
    missing = max(0, held_out - len(by_side[VAL]))
    by_side[VAL] += free[:missing]
    by_side[TRAIN] += free[missing:]
    groups = {}
    for side in (TRAIN, VAL):
        sides |= {text_key(prompt.text): side for prompt in by_side[side]}
        random.shuffle(by_side[side])  # otherwise all shared prompts would be in the first texts
        groups[side] = whole_groups(by_side[side], size)
    grouped = size * (len(groups[TRAIN]) + len(groups[VAL]))
    repeated = len(prompts) - len(distinct)
    return PromptSplit(groups[TRAIN], groups[VAL], repeated, len(distinct) - grouped)


@dataclass(frozen=True)
class PreparedPrompts:
    """The content of a directory of prepared prompts."""

    directory: Path
    record: PreparedRecord
    groups: Mapping[str, PromptGroups]

    def groups_of(self, dataset: str) -> PromptGroups:
        """Returns the groups of one dataset. Raises UsageError, which names the prepared datasets,
        if it has none to train on."""
        found = self.groups.get(dataset)
        if found is None or not found.train:
            known = sorted(self.groups)
            raise UsageError(
                f"{self.directory}: no prompts of the dataset '{dataset}' in it."
                f"{did_you_mean(dataset, known)} It has: {listing(known)}; prepare all datasets "
                "together: `loragen data prepare --source FILE --source FILE ...`"
            )
        return found


def check_prepared(directory: Path) -> None:
    """Raises UsageError if the directory has no prepared prompts."""
    if not directory.is_dir():
        raise UsageError(f"{directory}: no such directory of prompts (`loragen data prepare`)")
    if not (directory / RECORD).is_file():
        raise UsageError(f"{directory}: no {RECORD} in it; `loragen data prepare` makes one")


def read_prepared(directory: Path) -> PreparedPrompts:
    """Reads the files that `prepare` has written.

    Raises UsageError if they are missing, DataError (with file:line) if one is damaged.
    """
    check_prepared(directory)
    file = directory / RECORD
    record = record_of(read_json(file), PreparedRecord, file, "the record of prepared prompts")
    groups: dict[str, PromptGroups] = defaultdict(lambda: PromptGroups([], []))
    for name in (TRAIN, VAL):
        file = directory / name
        for line, value, problem in DataFile(file).documents():
            try:
                if problem:
                    raise DataError(f"{file}:{line}: {problem}")
                text = PreparedText.model_validate(value)
            except ValidationError as error:
                reason = error.errors()[0]["msg"]
                raise DataError(
                    f"{file}:{line}: not a line of `loragen data prepare`: {reason}"
                ) from None
            found = groups[text.dataset]
            (found.train if name == TRAIN else found.val).append(tuple(text.prompts))
    return PreparedPrompts(directory, record, dict(groups))
