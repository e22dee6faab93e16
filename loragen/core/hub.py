"""What is on the Hugging Face hub, and whether it can be asked: one short look, since its libraries
retry for half a minute on a machine without network."""

import os
import socket
from functools import cache
from importlib.resources import files
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

from loragen.core.config import DEMO
from loragen.core.errors import UsageError

SECONDS_TO_ANSWER = 10


def resolve_base(name: str) -> str:
    """What transformers is asked for: the shipped demo base, a directory, or a hub id.

    Raises UsageError for a path that is not there, which transformers would take for a hub id.
    """
    if name == DEMO:
        return str(files("loragen").joinpath("demo", "base"))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"base model {name}: the directory has no config.json")
        return str(path)
    if is_place(name):
        raise UsageError(f"base model {name}: no such directory")
    return name


def is_place(name: str) -> bool:
    """Whether a model's name can only be a directory's, and not a hub id."""
    rooted = Path(name).expanduser().is_absolute() or name.startswith((".", "~"))
    return rooted or "\\" in name or name.count("/") > 1


@cache
def silence() -> str | None:
    """Why the hub cannot be asked, and what to do; None where it answers or is not to be asked."""
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return None
    try:
        urlopen(Request(ENDPOINT, method="HEAD"), timeout=SECONDS_TO_ANSWER).close()
    except (URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, socket.gaierror | ConnectionError | TimeoutError):
            mirror = "" if os.environ.get("HF_ENDPOINT") else "HF_ENDPOINT names a mirror, "
            return (
                f"{ENDPOINT} does not answer ({reason}); "
                f"{mirror}HF_HUB_OFFLINE=1 reads what was downloaded before"
            )
    return None
