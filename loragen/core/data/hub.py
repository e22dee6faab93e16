"""Datasets of the Hugging Face hub, through the `datasets` library where it is installed."""

import os
import socket
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

from loragen.core.errors import UsageError

SECONDS_TO_ANSWER = 10


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
    _require_answer(identifier)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(identifier, config, split=split)  # type: ignore[no-any-return]
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"hub dataset {identifier}: {reason}") from error


def _require_answer(identifier: str) -> None:
    """One short look, since the libraries retry for half a minute on a machine without network."""
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE

    if HF_HUB_OFFLINE or Path(identifier).is_dir():
        return
    try:
        urlopen(Request(ENDPOINT, method="HEAD"), timeout=SECONDS_TO_ANSWER).close()
    except (URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, socket.gaierror | ConnectionError | TimeoutError):
            mirror = "" if os.environ.get("HF_ENDPOINT") else "HF_ENDPOINT names a mirror, "
            raise UsageError(
                f"hub dataset {identifier}: {ENDPOINT} does not answer ({reason}); "
                f"{mirror}HF_HUB_OFFLINE=1 reads what was downloaded before"
            ) from None
