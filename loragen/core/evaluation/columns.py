"""The columns of the table: which there are and where each one's class stands. Light.

A new column is one class with `entries` (see `contestants.Contestant`) and one line here.
"""

from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

from loragen.core.errors import UsageError, did_you_mean, listing

GENERATED = "generated"
MULTI_TASK = "multi_task"
ORACLE = "oracle"


class Column(NamedTuple):
    name: str
    title: str
    """Above the column; `{shots}` is their number."""
    contestant: str
    """`module:Class`, imported when the column is wanted."""
    trains: bool = False
    """Trains a LoRA first, and so only on demand."""
    needs_sources: bool = False
    """Reads the generator's training runs, which may be on another machine."""
    if_alone: bool = False
    """Needs them only where a single dataset is evaluated: of several, another one serves."""

    def reads_sources(self, datasets: int) -> bool:
        """In an evaluation of as many datasets."""
        return self.needs_sources and (datasets == 1 or not self.if_alone)


_HERE = "loragen.core.evaluation.contestants"

COLUMNS = (
    Column("base", "base", f"{_HERE}:Base"),
    Column("mean_adapter", "mean", f"{_HERE}:MeanAdapter"),
    Column("nearest_adapter", "nearest", f"{_HERE}:NearestAdapter", needs_sources=True),
    Column(MULTI_TASK, "multi-task", f"{_HERE}:MultiTask", trains=True, needs_sources=True),
    Column("few_shot", "{shots}-shot", f"{_HERE}:FewShot"),
    Column(
        "random_prompts",
        "random prompts",
        f"{_HERE}:RandomPrompts",
        needs_sources=True,
        if_alone=True,
    ),
    Column(GENERATED, "generated", f"{_HERE}:Generated"),
    Column(ORACLE, "oracle", f"{_HERE}:Oracle", trains=True, needs_sources=True),
)
NAMES = tuple(column.name for column in COLUMNS)


def chosen(wanted: Sequence[str], also: Iterable[str] = ()) -> list[Column]:
    """The columns named, in the table's order; for none named all that need no training. `also`
    are further names. `-` and `_` are the same.

    Raises UsageError for an unknown name.
    """
    names = [name.strip().replace("-", "_") for name in wanted if name.strip()]
    for name in names:
        if name not in NAMES:
            raise UsageError(
                f"--columns: unknown column '{name}'.{did_you_mean(name, NAMES)} "
                f"There are: {listing(NAMES)}"
            )
    names = names or [column.name for column in COLUMNS if not column.trains]
    return [column for column in COLUMNS if column.name in {*names, *also}]


def contestant_class(column: Column) -> Any:
    """The class that competes in the column."""
    module, _, name = column.contestant.partition(":")
    return getattr(import_module(module), name)


def titles(shots: int) -> dict[str, str]:
    """What stands above each column."""
    return {column.name: column.title.format(shots=shots) for column in COLUMNS}
