"""The Hugging Face hub: whether it answers, reading `hf://owner/name`, and writing in commits.

What is read is in the hub's own cache afterwards (HF_HOME), where other programs find it, too, and
is used from there if the hub does not answer.
"""

import errno
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from loragen.core.errors import LoragenError, UsageError, first_line
from loragen.core.files import user_path

PREFIX = "hf://"
TIMEOUT = 10
"""Seconds to wait for the hub's answer."""
PLACE = "DIRECTORY OF THIS FILE"
"""What a model card says in place of its own directory; the card on the hub has its repository."""
CONFLICT = 412
"""The HTTP status of a commit whose parent is no longer the newest."""
SOURCE = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([^\s/@]+))?(?:/([^\s@]+))?")


class NotOnHub(UsageError):  # noqa: N818  # as FileNotFoundError would not say more
    """There is no such repository, or it has nothing of what is looked for."""


class Outdated(LoragenError):  # noqa: N818  # the caller tries again
    """Somebody has committed to the repository since it was read."""


@cache
def hub_problem() -> str | None:
    """Returns why the Hugging Face hub cannot be reached, and what to do; None if it answers or
    HF_HUB_OFFLINE is set.

    It makes one short request, because the hub's libraries retry for half a minute without a
    network.
    """
    import socket
    from http.client import HTTPException
    from urllib.request import Request, urlopen

    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return None
    unreachable = (socket.gaierror, ConnectionError, TimeoutError, HTTPException)
    try:
        urlopen(Request(ENDPOINT, method="HEAD"), timeout=TIMEOUT).close()
    except ValueError:
        return f"HF_ENDPOINT {ENDPOINT} is not a URL; it begins with https://"
    except (OSError, HTTPException) as error:  # an HTTP status is an answer
        reason = getattr(error, "reason", error)
        number = getattr(reason, "errno", None)
        if isinstance(reason, unreachable) or number in (errno.ENETUNREACH, errno.EHOSTUNREACH):
            mirror = "" if os.environ.get("HF_ENDPOINT") else "HF_ENDPOINT names a mirror, "
            return (
                f"{ENDPOINT} does not answer ({reason}); "
                f"{mirror}HF_HUB_OFFLINE=1 reads what was downloaded before"
            )
    return None


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


def local_path(source: str | Path, only: tuple[str, ...] = ()) -> Path:
    """Returns the path of a source on this machine; one on the hub is downloaded, or of it only the
    files that match one of the patterns `only`.

    Raises UsageError if it is not there, or the hub does not answer and the cache does not have it.
    """
    return _downloaded(str(source), only) if on_hub(source) else user_path(str(source))


@cache
def _downloaded(source: str, only: tuple[str, ...] = ()) -> Path:
    """Returns the snapshot of a source, which a command opens once."""
    repository, revision, folder = check_source(source)
    from huggingface_hub import snapshot_download

    _quiet()
    problem = hub_problem()
    inside = f"{folder}/" if folder else ""
    with _hub_errors(source, problem):
        snapshot = Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=[f"{inside}{one}" for one in only or ("*",)],
                local_files_only=problem is not None,
            )
        )
    if not (snapshot / folder).exists():
        raise NotOnHub(f"{source}: the repository has no {folder or ' or '.join(only)}")
    return snapshot / folder


def base_name(path: Path) -> str:
    """Returns the last part of a path; of a snapshot in the hub's cache, whose last part is a
    commit, the name of the repository."""
    repository = path.parent.parent.name
    if path.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.rpartition("--")[2]
    return path.name


def check_push(repository: str, what: str = "") -> None:
    """Raises UsageError, which begins with `what`, if nothing can be pushed to a repository: its id
    is malformed, the hub does not answer, or there is no token. The commands call it before they
    compute anything."""
    check_repository(repository)
    from huggingface_hub import get_token
    from huggingface_hub.constants import HF_HUB_OFFLINE

    what = what or f"--push-to-hub {repository}"
    problem = "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else hub_problem()
    if problem:
        raise UsageError(f"{what}: {problem}")
    if get_token() is None:
        raise UsageError(
            f"{what}: no token of the hub; log in with `hf auth login`, or set HF_TOKEN"
        )


def push(directory: Path, files: Iterable[str], repository: str, private: bool) -> str:
    """Commits files of a directory to a repository, which is made if there is none, and returns its
    URL. The model card names the repository as the place to load from.

    Raises LoragenError if the hub refuses it.
    """
    what = f"--push-to-hub {repository}"
    contents: dict[str, Path | bytes] = {name: directory / name for name in sorted(files)}
    if "README.md" in contents:
        text = (directory / "README.md").read_text(encoding="utf-8")
        card = text.partition("\n\n<!-- written by ")[0].replace(PLACE, repository)
        contents["README.md"] = f"{card}\n".encode()
    url = make_repository(repository, private, what)
    commit(repository, contents, (), "Upload by loragen", what)
    return url


def make_repository(repository: str, private: bool, what: str) -> str:
    """Makes a repository if there is none, and returns its URL. Raises LoragenError, which begins
    with `what`, if the hub refuses it."""
    from huggingface_hub import HfApi

    _quiet()
    with _hub_errors(what, None, LoragenError):
        return str(HfApi().create_repo(repository, private=private, exist_ok=True))


def newest_commit(repository: str, what: str) -> str:
    """Returns the newest commit of a repository. Raises LoragenError."""
    from huggingface_hub import HfApi

    with _hub_errors(what, None, LoragenError):
        return str(HfApi().model_info(repository, revision="main").sha)


def commit(
    repository: str,
    contents: Mapping[str, Path | bytes],
    deleted: Iterable[str],
    message: str,
    what: str,
    parent: str | None = None,
) -> None:
    """Commits files, as `{path in the repository: file or bytes}`, and deletions.

    Raises Outdated if `parent` is given and no longer the newest commit, LoragenError, which begins
    with `what`, if the hub refuses it.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    _quiet()
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(path, str(one) if isinstance(one, Path) else one)
        for path, one in contents.items()
    ]
    operations += [CommitOperationDelete(path) for path in deleted]
    with _hub_errors(what, None, LoragenError):
        try:
            HfApi(library_name="loragen").create_commit(
                repository, operations, commit_message=message, parent_commit=parent
            )
        except HfHubHTTPError as error:
            if parent and error.response.status_code == CONFLICT:
                raise Outdated(f"{what}: somebody else has committed to it meanwhile") from None
            raise
    _downloaded.cache_clear()


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
        raise (NotOnHub if kind is UsageError else kind)(
            f"{what}: there is no such repository, or it is private and needs a token of yours "
            "(`hf auth login`, or HF_TOKEN)"
        ) from None
    except errors.RevisionNotFoundError:
        raise kind(f"{what}: the repository has no such revision") from None
    except errors.LocalEntryNotFoundError as error:
        offline = "it is not in the hub's cache, and HF_HUB_OFFLINE is set"
        reason = problem or (offline if HF_HUB_OFFLINE else first_line(error))
        raise kind(f"{what}: {reason}") from error
    except (errors.HTTPError, OSError, ValueError) as error:  # type: ignore[attr-defined]  # imported there
        raise kind(f"{what}: the hub says: {first_line(error)}") from error
