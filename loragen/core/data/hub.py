"""Datasets of the Hugging Face hub, through the `datasets` library where it is installed."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from loragen.core.errors import UsageError
from loragen.core.hub import silence


def read_hub(identifier: str, config: str | None, split: str) -> Iterable[dict[str, Any]]:
    """The rows of one split, downloaded or from the cache.

    Raises UsageError, within seconds, where they cannot be had.
    """
    try:
        import datasets
    except ImportError:
        raise UsageError(
            f"hub dataset {identifier}: needs the package datasets, which is not installed: "
            "pip install 'loragen[data]'"
        ) from None
    why = None if Path(identifier).is_dir() else silence()
    if why:
        raise UsageError(f"hub dataset {identifier}: {why}")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(identifier, config, split=split)  # type: ignore[no-any-return]  # rows are mappings
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"hub dataset {identifier}: {reason}") from error
