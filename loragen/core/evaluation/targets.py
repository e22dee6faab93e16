"""The datasets of an evaluation. Light: they are found and read before torch is imported."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loragen.core.data.dataset import Dataset, Row, closed_answers
from loragen.core.data.documents import HubDataset
from loragen.core.errors import LoragenError, UsageError

ALL = "all"
"""The group of datasets that have no other."""

PromptsFrom = Literal["train split", "tested rows"]


@dataclass(frozen=True, eq=False)
class Target:
    """One dataset that adapters are generated for and tested on."""

    group: str
    """Averages are taken over the datasets of a group."""
    dataset: Dataset
    """The tested split."""
    rows: Sequence[Row]
    """The tested rows."""
    prompts: Sequence[str]
    """The unlabelled prompts that the generator may read."""
    prompts_from: PromptsFrom
    train: Dataset | None = None
    """The train split, used by few-shot prompting and the oracle alone."""
    train_rows: Sequence[Row] = ()
    closed: list[str] | None = None
    """The dataset's answers, if they are few and recur."""

    @classmethod
    def of(
        cls,
        dataset: Dataset,
        train: Dataset | None = None,
        *,
        group: str = ALL,
        prompts_from: PromptsFrom | None = None,
        limit: int | None = None,
        skip_bad_rows: bool = False,
    ) -> "Target":
        """Reads both splits, and keeps the first `limit` tested rows. By default, prompts are those
        of the train split if there is one. Raises DataError for bad rows."""
        rows = dataset.rows(skip_bad_rows)
        train_rows = train.rows(skip_bad_rows) if train else []
        prompts_from = prompts_from or ("train split" if train_rows else "tested rows")
        prompted = train_rows if prompts_from == "train split" else rows
        prompts = [row.prompt for row in prompted]
        closed = closed_answers([*train_rows, *rows])
        return cls(group, dataset, rows[:limit], prompts, prompts_from, train, train_rows, closed)

    @property
    def name(self) -> str:
        return self.dataset.name

    @property
    def key(self) -> tuple[str, str]:
        """Identifies the dataset within an evaluation, also in another process."""
        return self.group, self.name


def find_targets(
    names: Sequence[str],
    root: Path,
    limit: int | None = None,
    skip_bad_rows: bool = False,
    split: str = "test",
    prompts_from: PromptsFrom | None = None,
) -> list[Target]:
    """Finds the datasets to be tested: names below `root`, whose split `split` is read, or files;
    `limit` keeps the first rows of each.

    Raises LoragenError with the problems of all datasets at once: datasets that are missing, bad
    rows, and two datasets of one name.
    """
    targets: list[Target] = []
    problems: list[str] = []
    for name in dict.fromkeys(names):
        try:
            tested = Dataset.find(name, root, split=split)
            train = _train_split(name, root, tested)
            if prompts_from == "train split" and train is None:
                raise UsageError(f"{name}: no train split to take prompts from")
            targets.append(
                Target.of(
                    tested,
                    train,
                    prompts_from=prompts_from,
                    limit=limit,
                    skip_bad_rows=skip_bad_rows,
                )
            )
        except LoragenError as error:
            if len(names) == 1:
                raise
            problems += error.problems
    found = [target.name for target in targets]
    twice = {name for name in found if found.count(name) > 1}
    problems += [f"{name}: two datasets have this name; rename a file" for name in sorted(twice)]
    if problems:
        raise UsageError(*problems)
    return targets


def _train_split(name: str, root: Path, tested: Dataset) -> Dataset | None:
    """Returns the train split of a name that has both splits; a file is a single split."""
    try:
        train = Dataset.find(name, root, split="train")
    except LoragenError:
        return None
    on_hub = isinstance(train.source, HubDataset)
    return None if on_hub or train.source == tested.source else train


def check_oracles(targets: Sequence[Target]) -> None:
    """Raises UsageError for datasets that have no other labels than those of the tested rows."""
    problem = (
        "no train split to train an oracle on; give a folder with a train and a test file, or "
        "leave out the oracle"
    )
    if without := [target.name for target in targets if target.train is None]:
        raise UsageError(*(f"{name}: {problem}" for name in without))
