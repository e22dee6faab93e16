"""Prompts prepared once: random groups of a dataset's prompts, split into training and validation.

A directory has `train_prompts.jsonl`, `val_prompts.jsonl` and `prepared.json`, which says how and
of what they were made; several datasets may share it.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from loragen.core.data.dataset import Dataset, Prompt
from loragen.core.data.documents import Source, read_documents
from loragen.core.data.prompts import same_text, text_of, whole_groups
from loragen.core.errors import DataError, UsageError, did_you_mean, listing
from loragen.core.files import write_json, write_text

FORMAT_VERSION = 1
TRAIN, VAL, RECORD = "train_prompts.jsonl", "val_prompts.jsonl", "prepared.json"


class Text(BaseModel):
    """A line of the files: some prompts, as the one text that a generator sees."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str
    prompts: list[str] = Field(min_length=1)
    dataset: str
    lines: list[int]
    """Of `prompts` in the dataset's file, counted from 1."""


class PreparedDataset(BaseModel):
    """What became of the prompts of one dataset."""

    dataset: str
    path: str
    sha256: str
    bad_rows: int
    prompts: int
    repeated: int
    """Prompts left out, since an earlier one has the same text."""
    left_over: int
    """Prompts left out, since they are too few for a text."""
    train: int
    """Texts."""
    val: int


class Grouping(BaseModel):
    """How prompts are joined and split."""

    samples_per_prompt: int = Field(4, ge=1)
    test_ratio: float = Field(0.1, ge=0, lt=1)
    seed: int = 42


class PreparedRecord(Grouping):
    """prepared.json"""

    format_version: int = FORMAT_VERSION
    kind: Literal["prompts"] = "prompts"
    datasets: list[PreparedDataset]


@dataclass(frozen=True)
class Split:
    """Groups of prompts."""

    train: list[tuple[Prompt, ...]]
    val: list[tuple[Prompt, ...]]
    repeated: int
    left_over: int


@dataclass(frozen=True)
class Groups:
    """Prompts that make a text together: `train` to learn from, `val` held out."""

    train: list[tuple[str, ...]]
    val: list[tuple[str, ...]]


@dataclass(frozen=True)
class PreparedPrompts:
    """A directory of prepared prompts, read."""

    directory: Path
    record: PreparedRecord
    groups: Mapping[str, Groups]

    def of(self, dataset: str) -> Groups:
        """Raises UsageError for a dataset without prompts to learn from, naming those there are."""
        found = self.groups.get(dataset)
        if found is None or not found.train:
            known = sorted(self.groups)
            raise UsageError(
                f"{self.directory}: no prompts of the dataset '{dataset}' in it."
                f"{did_you_mean(dataset, known)} It has: {listing(known)}; prepare all datasets "
                "together: `loragen data prepare --source FILE --source FILE ...`"
            )
        return found


def prepare(
    sources: Sequence[tuple[str, Source]],
    directory: Path,
    grouping: Grouping,
    skip_bad_rows: bool = False,
    force: bool = False,
) -> PreparedRecord:
    """Writes the directory's three files from (dataset, its source) pairs. The same sources and
    grouping give the same bytes.

    Raises UsageError for files that are there already (without `force`), what is missing, or two
    datasets of one name; DataError for bad rows (unless skipped) or too few prompts.
    """
    _refuse_existing(directory, force)
    names = [name for name, _ in sources]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UsageError(f"two sources are called {twice}: rename one of the files")
    sides: dict[str, str] = {}
    texts: dict[str, list[Text]] = {TRAIN: [], VAL: []}
    datasets = []
    for name, source in sources:
        dataset = Dataset(source, name)
        prompts, bad_rows = dataset.numbered_prompts(skip_bad_rows)
        found = split(prompts, name, grouping, sides)
        _check(source, prompts, found, grouping)
        texts[TRAIN] += (_text(name, group) for group in found.train)
        texts[VAL] += (_text(name, group) for group in found.val)
        datasets.append(_dataset_record(dataset, prompts, bad_rows, found))
    record = PreparedRecord(**grouping.model_dump(), datasets=datasets)
    _write(directory, texts, record)
    return record


def split(prompts: Sequence[Prompt], name: str, grouping: Grouping, sides: dict[str, str]) -> Split:
    """Random groups, none of whose prompts is in another.

    A prompt whose text an earlier one has (white space aside) is left out: without its label it
    says nothing new, and on the other side of the split it would be seen in training. `sides`
    remembers where each text went, so that one which several datasets have is on the same side in
    all of them.
    """
    distinct = list({same_text(prompt.text): prompt for prompt in reversed(prompts)}.values())
    random = Random(f"prepare:{grouping.seed}:{name}")
    random.shuffle(distinct)
    size = grouping.samples_per_prompt
    held_out = _held_out_texts(len(distinct) // size, grouping.test_ratio) * size
    by_side = defaultdict(list)
    for prompt in distinct:
        by_side[sides.get(same_text(prompt.text), "")].append(prompt)
    free = by_side[""]
    missing = max(0, held_out - len(by_side[VAL]))
    by_side[VAL] += free[:missing]
    by_side[TRAIN] += free[missing:]
    groups = {}
    for side in (TRAIN, VAL):
        sides |= {same_text(prompt.text): side for prompt in by_side[side]}
        random.shuffle(by_side[side])  # what another dataset has too is not all in the first texts
        groups[side] = whole_groups(by_side[side], size)
    grouped = size * (len(groups[TRAIN]) + len(groups[VAL]))
    repeated = len(prompts) - len(distinct)
    return Split(groups[TRAIN], groups[VAL], repeated, len(distinct) - grouped)


def check_prepared(directory: Path) -> None:
    """Raises UsageError where there are no prepared prompts."""
    if not directory.is_dir():
        raise UsageError(f"{directory}: no such directory of prompts (`loragen data prepare`)")
    if not (directory / RECORD).is_file():
        raise UsageError(f"{directory}: `loragen data prepare` has not made it (no {RECORD})")


def read_prepared(directory: Path) -> PreparedPrompts:
    """Raises UsageError where there is none, DataError (with file:line) where a file is not as
    `prepare` writes it."""
    check_prepared(directory)
    record = _read_record(directory / RECORD)
    groups: dict[str, Groups] = defaultdict(lambda: Groups([], []))
    for name in (TRAIN, VAL):
        for text in _read_texts(directory / name):
            found = groups[text.dataset]
            (found.train if name == TRAIN else found.val).append(tuple(text.prompts))
    return PreparedPrompts(directory, record, dict(groups))


def _refuse_existing(directory: Path, force: bool) -> None:
    """The directory may have other files: only those of its own are in the way."""
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory} is a file; --output is a directory")
    existing = [name for name in (RECORD, TRAIN, VAL) if (directory / name).exists()]
    if existing and not force:
        raise UsageError(
            f"{directory} has {listing(existing)} already; choose another place or add --force"
        )


def _check(source: Source, prompts: Sequence[Prompt], found: Split, grouping: Grouping) -> None:
    if not prompts:
        raise DataError(f"{source}: no prompts in it")
    if not found.train:
        raise DataError(
            f"{source}: {len(prompts) - found.repeated} different prompts are too few for a text "
            f"of {grouping.samples_per_prompt} to learn from; lower --samples-per-prompt"
        )


def _dataset_record(
    dataset: Dataset, prompts: Sequence[Prompt], bad_rows: int, found: Split
) -> PreparedDataset:
    return PreparedDataset(
        dataset=dataset.name,
        path=dataset.location,
        sha256=dataset.sha256,
        bad_rows=bad_rows,
        prompts=len(prompts),
        repeated=found.repeated,
        left_over=found.left_over,
        train=len(found.train),
        val=len(found.val),
    )


def _held_out_texts(texts: int, ratio: float) -> int:
    """At least one, and one is left to learn from."""
    return min(texts - 1, max(1, round(texts * ratio))) if ratio and texts > 1 else 0


def _text(dataset: str, group: Sequence[Prompt]) -> Text:
    prompts = [prompt.text for prompt in group]
    lines = [prompt.line for prompt in group]
    return Text(prompt=text_of(prompts), prompts=prompts, dataset=dataset, lines=lines)


def _write(directory: Path, texts: Mapping[str, Sequence[Text]], record: PreparedRecord) -> None:
    """The record goes first and comes last: what is there with it is whole."""
    (directory / RECORD).unlink(missing_ok=True)
    for name, of_file in texts.items():
        lines = (json.dumps(text.model_dump(), ensure_ascii=False) for text in of_file)
        write_text(directory / name, "".join(f"{line}\n" for line in lines))
    write_json(directory / RECORD, record.model_dump())


def _read_record(file: Path) -> PreparedRecord:
    try:
        record = PreparedRecord.model_validate_json(file.read_bytes())
    except ValidationError as error:
        reason = "; ".join(str(error).splitlines()[:2])
        raise DataError(f"{file}: not the record of prepared prompts: {reason}") from None
    if record.format_version > FORMAT_VERSION:
        raise DataError(
            f"{file}: format {record.format_version} is newer than this loragen reads "
            f"({FORMAT_VERSION}); upgrade loragen"
        )
    return record


def _read_texts(file: Path) -> list[Text]:
    texts = []
    for line, value, problem in read_documents(file):
        try:
            if problem:
                raise DataError(f"{file}:{line}: {problem}")
            texts.append(Text.model_validate(value))
        except ValidationError as error:
            raise DataError(
                f"{file}:{line}: not a line of `loragen data prepare`: {error.errors()[0]['msg']}"
            ) from None
    return texts
