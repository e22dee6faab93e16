"""The datasets that adapters are made for and tested on. Light: found and read without torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loragen.core.data.documents import Source, location
from loragen.core.data.rows import Row, closed_answers, find_dataset, read_rows
from loragen.core.errors import LoragenError, UsageError

ALL = "all"
"""The group of datasets that belong to no other."""

PromptsFrom = Literal["train split", "tested rows"]


@dataclass(frozen=True)
class Target:
    """One dataset: a row of the table."""

    group: str
    """Averages are taken over the datasets of a group."""
    name: str
    source: str
    """Where the tested rows are from."""
    rows: Sequence[Row]
    """Tested on."""
    prompts: Sequence[str]
    """What the generator may see, without labels."""
    prompts_from: PromptsFrom
    train_source: Source | None = None
    train_rows: Sequence[Row] = ()
    """Labelled: for the k-shot prompts and the oracle alone."""
    closed: list[str] | None = None
    """The answers of the dataset, where they are few and recur."""

    @property
    def key(self) -> tuple[str, str]:
        return self.group, self.name


def find_targets(
    names: Sequence[str], root: Path, limit: int | None = None, skip_bad_rows: bool = False
) -> list[Target]:
    """Names below `root`, which are tested on their test split, or files, tested as they are; the
    first `limit` rows of each.

    Raises LoragenError with the problems of all datasets at once: what is not there, bad rows,
    and two datasets of one name.
    """
    targets: list[Target] = []
    problems: list[str] = []
    for name in dict.fromkeys(names):
        try:
            targets.append(_target(name, root, limit, skip_bad_rows))
        except LoragenError as error:
            if len(names) == 1:
                raise
            problems += error.problems
    found = [target.name for target in targets]
    twice = {name for name in found if found.count(name) > 1}
    problems += [f"two datasets are called {name}: rename a file" for name in sorted(twice)]
    if problems:
        raise UsageError(*problems)
    return targets


def check_oracles(targets: Sequence[Target]) -> None:
    """Raises UsageError for datasets that have no labels but those they are tested on."""
    without = [target.name for target in targets if target.train_source is None]
    if without:
        raise UsageError(
            *(
                f"{name}: no train split to train an oracle on; give a folder with a train and a "
                "test file, or leave out the oracle"
                for name in without
            )
        )


def _target(wanted: str, root: Path, limit: int | None, skip_bad_rows: bool) -> Target:
    name, source = find_dataset(wanted, root, split="test")
    rows = read_rows(source, skip_bad_rows)
    train_source = _train_split(wanted, root, source)
    train_rows = read_rows(train_source, skip_bad_rows) if train_source else []
    return Target(
        group=ALL,
        name=name,
        source=location(source),
        rows=rows[:limit],
        prompts=[row.prompt for row in train_rows or rows],
        prompts_from="train split" if train_rows else "tested rows",
        train_source=train_source,
        train_rows=train_rows,
        closed=closed_answers([*train_rows, *rows]),
    )


def _train_split(wanted: str, root: Path, tested: Source) -> Path | None:
    """Beside the tested split of a name; a file has no other split."""
    try:
        _, source = find_dataset(wanted, root, split="train")
    except LoragenError:
        return None
    return source if isinstance(source, Path) and source != tested else None
