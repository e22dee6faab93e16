"""The Hugging Face hub as a place of adapters: `hf://owner/name` is read, and outputs are pushed.

What is read is in the hub's own cache afterwards (HF_HOME), where other programs find it, too, and
is used from there if the hub does not answer.
"""

import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from loragen.core.errors import LoragenError, UsageError
from loragen.core.files import hub_problem, user_path

PREFIX = "hf://"
PLACE = "DIRECTORY OF THIS FILE"
"""What a model card says in place of its own directory; the card on the hub has its repository."""
SOURCE = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([^\s/@]+))?(?:/([^\s@]+))?")


def on_hub(text: object) -> bool:
    """Returns whether a source is named as one on the hub."""
    return str(text).startswith(PREFIX)


def check_source(text: str) -> tuple[str, str | None, str]:
    """Returns repository, revision and folder of `hf://owner/name[@revision][/folder]`; the hub is
    not asked. Raises UsageError for a malformed one."""
    parts = SOURCE.fullmatch(text)
    if parts is None or ".." in Path(parts[3] or "").parts:
        raise UsageError(f"{text}: expected hf://owner/name, with @revision and /folder if needed")
    check_repository(parts[1], text)
    return parts[1], parts[2], (parts[3] or "").rstrip("/")


def check_repository(repository: str, given: str = "") -> None:
    """Raises UsageError if the hub would not accept the id of a repository with an owner."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # imported there

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        reason = str(error).partition(":")[0]
        raise UsageError(f"{given or repository}: no id of a repository: {reason}") from None
    if "/" not in repository:
        raise UsageError(f"{repository}: a repository is named OWNER/NAME")


def local_path(source: str | Path) -> Path:
    """Returns the path of a source on this machine; one on the hub is downloaded.

    Raises UsageError if it is not there, or the hub does not answer and the cache does not have it.
    """
    return _downloaded(str(source)) if on_hub(source) else user_path(str(source))


@cache
def _downloaded(source: str) -> Path:
    """Returns the snapshot of a source, which a command opens once."""
    repository, revision, folder = check_source(source)
    from huggingface_hub import snapshot_download

    _quiet()
    problem = hub_problem()
    with _hub_errors(source, problem):
        snapshot = Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=f"{folder}/*" if folder else None,
                local_files_only=problem is not None,
            )
        )
    if not (snapshot / folder).exists():
        raise UsageError(f"{source}: the repository has no {folder}")
    return snapshot / folder


def base_name(path: Path) -> str:
    """Returns the last part of a path; of a snapshot in the hub's cache, whose last part is a
    commit, the name of the repository."""
    repository = path.parent.parent.name
    if path.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.rpartition("--")[2]
    return path.name


def check_push(repository: str) -> None:
    """Raises UsageError if nothing can be pushed to a repository: its id is malformed, the hub does
    not answer, or there is no token. The commands call it before they compute anything."""
    check_repository(repository)
    from huggingface_hub import get_token
    from huggingface_hub.constants import HF_HUB_OFFLINE

    problem = "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else hub_problem()
    if problem:
        raise UsageError(f"--push-to-hub {repository}: {problem}")
    if get_token() is None:
        raise UsageError(
            f"--push-to-hub {repository}: no token of the hub; log in with `hf auth login`, or set "
            "HF_TOKEN"
        )


def push(directory: Path, files: Iterable[str], repository: str, private: bool) -> str:
    """Commits files of a directory to a repository, which is made if there is none, and returns its
    URL. The model card names the repository as the place to load from.

    Raises LoragenError if the hub refuses it.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    _quiet()
    operations = []
    for name in sorted(files):
        content: str | bytes = str(directory / name)
        if name == "README.md":
            card = (directory / name).read_text(encoding="utf-8").partition("\n\n<!-- written by ")
            content = f"{card[0].replace(PLACE, repository)}\n".encode()
        operations.append(CommitOperationAdd(path_in_repo=name, path_or_fileobj=content))
    api = HfApi(library_name="loragen")
    with _hub_errors(f"--push-to-hub {repository}", None, LoragenError):
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.create_commit(repository, operations, commit_message="Upload by loragen")
    return str(url)


def _quiet() -> None:
    """Silences the progress bars and warnings of the hub's client; its errors are raised."""
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


@contextmanager
def _hub_errors(
    what: str, problem: str | None, kind: type[LoragenError] = UsageError
) -> Iterator[None]:
    """Raises one clear line for what the hub's client raises."""
    from huggingface_hub import errors
    from huggingface_hub.constants import HF_HUB_OFFLINE

    try:
        yield
    except errors.GatedRepoError:
        raise kind(f"{what}: the repository is gated; ask for access on its page") from None
    except errors.RepositoryNotFoundError:
        raise kind(
            f"{what}: there is no such repository, or it is private and needs a token of yours "
            "(`hf auth login`, or HF_TOKEN)"
        ) from None
    except errors.RevisionNotFoundError:
        raise kind(f"{what}: the repository has no such revision") from None
    except errors.LocalEntryNotFoundError as error:
        offline = "it is not in the hub's cache, and HF_HUB_OFFLINE is set"
        reason = problem or (offline if HF_HUB_OFFLINE else str(error).partition("\n")[0])
        raise kind(f"{what}: {reason}") from error
    except (errors.HTTPError, OSError, ValueError) as error:  # type: ignore[attr-defined]  # imported there
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise kind(f"{what}: the hub says: {reason}") from error
