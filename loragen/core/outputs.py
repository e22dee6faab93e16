"""What a command may write, and what it may replace: its own earlier output and nothing else.

One rule everywhere. Without `--force` nothing is replaced. With it, a file is replaced only if it
carries loragen's mark: a record beside it, or in it, with the hash of what loragen wrote. Files
without one stay where they are, and a command that would need their names is refused. An output
that is an input is refused always.
"""

import hashlib
import json
import logging
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from loragen.core.errors import UsageError
from loragen.core.files import (
    UNFINISHED,
    path_problem,
    sha256,
    user_path,
    write_errors,
    written_atomically,
)

log = logging.getLogger(__name__)

Record = Mapping[str, str | None]
"""{name of a file in a directory: the hash of what loragen wrote there, or None for the file that
holds the record itself}"""
BESIDE = "written by loragen beside this file: "
SEAL = "written by loragen; sha256 of the text above: "


def refuse_existing(
    path: Path, force: bool, record: Callable[[Path], Record | None], names: Sequence[str] = ()
) -> None:
    """Raises UsageError if a directory with an output must not be written at `path`: something is
    there, and `force` is not given, or it is not an earlier output of the same kind, or a file of
    it has changed since; or if nothing can be written there.

    `record` returns what such an output records of its files, or None for any other directory.
    `names` are those of files to be written, so that a foreign file of that name is found early.
    """
    refuse_file(path)
    check_writable(path)
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not force:
        raise UsageError(f"{path} exists already; choose another path or add --force")
    own = record(path)
    if own is None:
        raise UsageError(
            f"{path} is no output of this command: --force replaces only what it has written before"
        )
    for name, digest in own.items():
        if digest and (path / name).is_file() and sha256(path / name) != digest:
            raise UsageError(
                f"{path / name} has changed since loragen wrote it, and --force would lose that; "
                "move it away, or choose another path"
            )
    _refuse_foreign(path, names, own)


def _refuse_foreign(path: Path, names: Sequence[str], own: Record) -> None:
    for name in names:
        if name not in own and (path / name).exists():
            raise UsageError(
                f"{path / name} was not written by loragen; move it away, or choose another path"
            )


def refuse_existing_file(file: Path, force: bool, is_ours: Callable[[Path], bool]) -> None:
    """Raises UsageError if `file` is a directory; if it exists, and `force` is not given or
    `is_ours` says that loragen has not written it; or if it cannot be written."""
    if file.is_dir():
        raise UsageError(f"{file} is a directory; name a file")
    refuse_file(file.parent)
    check_writable(file.parent)
    if not file.exists():
        return
    if not force:
        raise UsageError(f"{file} exists already; choose another path or add --force")
    if not is_ours(file):
        raise UsageError(
            f"{file} was not written by this command, or has changed since: --force does not "
            "replace it; choose another path"
        )


def refuse_file(directory: Path) -> None:
    """Raises UsageError if `directory`, or a parent of it, is a file."""
    for path in (directory, *directory.parents):
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is a file; --output is a directory")


def refuse_input(output: Path, inputs: Sequence[object]) -> None:
    """Raises UsageError if the output is one of the inputs, or a directory that one of them is in.

    Inputs that are no paths, such as the id of a model, are no directories either.
    """
    for given in inputs:
        path = user_path(str(given))
        if path_problem(path) or not path.exists() or not output.exists():
            continue
        if output.samefile(path):
            raise UsageError(f"{output} is an input of this command; choose another path")
        if output.resolve() in path.resolve().parents:
            raise UsageError(f"{output} holds {given}, an input; choose another path")


def check_writable(directory: Path) -> None:
    """Raises UsageError if no file can be made in a directory, or in that in which it will be."""
    place = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    try:
        Path(tempfile.mkdtemp(prefix=".loragen.", dir=place)).rmdir()
    except OSError as error:
        raise UsageError(f"{directory}: cannot be written: {error.strerror}") from None


def is_writable(cache: Path, otherwise: str) -> bool:
    """Returns whether files can be made in a directory that is not needed; if not, one warning says
    what happens `otherwise`."""
    try:
        check_writable(cache)
    except UsageError as error:
        log.warning("%s; %s", error, otherwise)
        return False
    return True


@contextmanager
def writable_or_temporary(cache: Path, otherwise: str) -> Iterator[Path]:
    """Yields the directory, or if no file can be made in it a temporary one."""
    if is_writable(cache, otherwise):
        yield cache
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as spare:
        yield Path(spare)


# ---------------------------------------------------------------------------- directories


@contextmanager
def written_directory(path: Path, record: Callable[[Path], Record | None]) -> Iterator[Path]:
    """Yields a new directory beside `path`, which takes its place once the block has succeeded.

    Where `path` holds an earlier output, its recorded files are replaced and all others stay. If
    there are none, the directory is replaced as a whole, so that a process that is killed leaves
    one of the two versions. Otherwise it leaves a directory whose record is right, from which files
    may be missing. Raises UsageError for a foreign file of the name of a new one.
    """
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        holding = tempfile.TemporaryDirectory(UNFINISHED, f".{path.name[:40]}.", path.parent)
    with holding as holder, write_errors(path, Path(holder)):
        new = Path(holder) / path.name
        new.mkdir()
        yield new
        own = (record(path) if path.is_dir() else None) or {}
        if not path.is_dir() or all(one.name in own for one in path.iterdir()):
            with written_atomically(path) as temporary:
                new.rename(temporary)
            return
        names = sorted(one.name for one in new.iterdir())
        _refuse_foreign(path, names, own)
        recording = [name for name, digest in (record(new) or {}).items() if digest is None]
        for name in own:
            if name not in recording:
                (path / name).unlink(missing_ok=True)
        for name in [*recording, *(name for name in names if name not in recording)]:
            (new / name).replace(path / name)


def hashes(directory: Path, without: Sequence[str] = ()) -> dict[str, str]:
    """Returns {path below the directory: hash} of all files in it."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    names = {path.relative_to(directory).as_posix(): path for path in files}
    return {name: sha256(path) for name, path in names.items() if name not in without}


def recorded(document: object, holder: str) -> Record | None:
    """Returns the record in the `files` of a document, which is in the file `holder`; None if there
    is none. Names that would leave the directory make it none: a record may be a stranger's."""
    files: Any = document.get("files") if isinstance(document, dict) else None
    if not isinstance(files, dict):
        return None
    for name, digest in files.items():
        parts = Path(name).parts
        if not parts or Path(name).is_absolute() or ".." in parts or not isinstance(digest, str):
            return None
    return {**files, holder: None}


def recorded_in_json(directory: Path, name: str) -> Record | None:
    """Returns the record of a JSON file of the directory."""
    try:
        return recorded(json.loads((directory / name).read_bytes()), name)
    except (OSError, ValueError):
        return None


def with_record(text: str, directory: Path) -> str:
    """Returns a Markdown text for a directory that is otherwise complete, with the record of the
    other files and its own hash in comments at its end."""
    record = BESIDE + json.dumps({"files": hashes(directory)})
    return sealed(f"{text.rstrip()}\n\n<!-- {record} -->", "<!-- {} -->")


def recorded_in_text(directory: Path, name: str) -> Record | None:
    """Returns the record of a Markdown file of the directory; if that has been changed, the record
    says so of itself."""
    try:
        text = (directory / name).read_text(encoding="utf-8")
        found = json.loads(text.rpartition(BESIDE)[2].partition(" -->")[0])
        own = recorded(found, name)
        return own if own is None or is_sealed(directory / name) else {**own, name: "changed"}
    except (OSError, ValueError):
        return None


def remove_recorded(directory: Path, own: Record) -> None:
    """Deletes the recorded files, and the directories that are empty then; all others stay."""
    for name in own:
        (directory / name).unlink(missing_ok=True)
    parents = {parent for name in own for parent in Path(name).parents} - {Path()}
    for parent in sorted(parents, key=lambda path: len(path.parts), reverse=True):
        with suppress(OSError):  # something else is in it
            (directory / parent).rmdir()


# ---------------------------------------------------------------------------- single files


def sealed(text: str, comment: str = "# {}") -> str:
    """Returns a text file's content with its hash in a last line, a comment of its language."""
    text = text if text.endswith("\n") else f"{text}\n"
    return text + comment.format(SEAL + hashlib.sha256(text.encode()).hexdigest()) + "\n"


def is_sealed(file: Path) -> bool:
    """Returns whether a file is as `sealed` made it."""
    above, _, last = file.read_bytes().rstrip(b"\n").rpartition(b"\n")
    found = re.search(re.escape(SEAL.encode()) + rb"([0-9a-f]{64})", last)
    digest = hashlib.sha256(above + b"\n").hexdigest()
    return found is not None and found[1].decode() == digest
