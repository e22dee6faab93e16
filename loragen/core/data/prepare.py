"""Deprecated: what `core.data.prompts` offers, under the names of before."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loragen.core.data import prompts
from loragen.core.data.dataset import Dataset
from loragen.core.data.prompts import (
    Grouping,
    PreparedPrompts,
    PreparedRecord,
    check_prepared,
    read_prepared,
)
from loragen.core.data.prompts import PromptGroups as Groups

__all__ = ["Grouping", "Groups", "PreparedPrompts", "check_prepared", "read_prepared"]


def prepare(sources: Sequence[Any], directory: Path, grouping: Grouping) -> PreparedRecord:
    """Deprecated: takes pairs of name and source."""
    datasets = [Dataset(source, name) for name, source in sources]
    return prompts.prepare(datasets, directory, grouping)
