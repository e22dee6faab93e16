"""Changes of a library: adapters are added, copied, taken out and removed.

What is added is written apart and checked, all adapters before the first is put in place. In a
folder, processes do that one after the other (`.library.lock`), and each directory is renamed into
its place. On the hub, a change is one commit upon the one that was read; if somebody else has
committed meanwhile, it is made again upon the newer one.
"""

import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from loragen.core.adapter import CARD, refuse_existing_adapter
from loragen.core.base.names import absolute_base
from loragen.core.data.dataset import Dataset, Row
from loragen.core.errors import DataError, LoragenError, UsageError, listing
from loragen.core.files import (
    UNFINISHED,
    file_name,
    sha256,
    sha256_text,
    write_json,
    write_text,
)
from loragen.core.hub import (
    PLACE,
    NotOnHub,
    Outdated,
    check_push,
    check_source,
    commit,
    local_path,
    make_repository,
    newest_commit,
    on_hub,
)
from loragen.core.learning.library.records import (
    ENTRY,
    LIBRARY,
    PROMPTS,
    RECORDS,
    AdapterLibrary,
    Centres,
    EncoderRecord,
    LibraryEntry,
    LibraryRecord,
    card_in,
    entry_record,
    load_address,
    read_entry,
)
from loragen.core.outputs import (
    check_writable,
    hashes,
    refuse_existing,
    refuse_file,
    remove_recorded,
    written_directory,
)
from loragen.core.run.directory import MANIFEST, LoraManifest, LoraRun, OtherRunError, Run
from loragen.core.run.lock import NO_LOCKS

if TYPE_CHECKING:
    from loragen.core.adapter.files import Adapter

log = logging.getLogger(__name__)

LOCK = ".library.lock"
COMMITS = 10
"""So often a change is tried again because others have committed to the repository meanwhile."""
ABANDONED_SECONDS = 24 * 3600.0
"""What a process that was killed has left unfinished is removed after so long."""


@dataclass(frozen=True)
class Changes:
    """What a change of a library has done, by the names of adapters."""

    added: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    """Those that the library had already, with the same weights and prompts."""
    url: str | None = None
    """Of the repository, if it is on the hub."""


@dataclass(frozen=True)
class AddOptions:
    """How adapters are added to a library."""

    prompts: str | None = None
    """The prompts of the adapter: a file, or a dataset on the hub; None: those of its run."""
    name: str | None = None
    answers: bool = True
    """Whether the answers are added with the prompts, if they are known."""
    base_model: str | None = None
    """Recorded instead of the base's own name."""
    encoder: str | None = None
    """The encoder of a new library, `sbert` by default."""
    encoder_options: Mapping[str, Any] | None = None
    license_id: str | None = None


@dataclass(frozen=True)
class _Candidate:
    """An adapter that is to be put into a library."""

    name: str
    adapter: "Adapter"
    documents: list[dict[str, Any]]
    """The lines of prompts.jsonl."""
    card: str
    """With `"PLACE"` as the place to load from."""
    base_fingerprint: str
    centre: tuple[str, list[float]] | None = None
    """The fingerprint of an encoder, and the centre by it."""


# ---------------------------------------------------------------------------- what is added


def _single(source: str) -> list[str]:
    """Returns a source, or of a folder of runs the newest finished run of each dataset. Raises
    UsageError if none has finished, DataError for a damaged manifest."""
    path = local_path(source)
    files = [] if (path / MANIFEST).is_file() else sorted(path.glob(f"*/{MANIFEST}"))
    if not files:
        return [source]
    runs = [Run.open(file.parent, LoraManifest) for file in files]
    finished = [r for r in runs if r.manifest.status == "success" and not r.manifest.is_test]
    if not finished:
        raise UsageError(
            f"{source}: none of its {len(runs)} runs has finished, but those of --test-mode; name "
            "one"
        )
    by_age = sorted(finished, key=lambda run: (run.manifest.started, run.directory.name))
    newest = {run.manifest.dataset.name: run for run in by_age}
    chosen = [run.directory for run in newest.values()]
    if left := [run.directory.name for run in runs if run.directory not in chosen]:
        log.info(
            "%s: left out, as not finished, not the newest, or of --test-mode: %s",
            source,
            listing(left, 5),
        )
    return [str(directory) for directory in chosen]


def _candidate(source: str, options: AddOptions) -> _Candidate:
    """Reads an adapter and its prompts: a run of `lora train`, one of its checkpoints, a PEFT
    directory, or an adapter of another library.

    Raises UsageError if something is missing or the prompts are not known, DataError for an adapter
    that no generator learns from and for bad rows.
    """
    from loragen.core.adapter.checks import check_ba, warn_of_config
    from loragen.core.adapter.export import export_card
    from loragen.core.run.checkpoints import read_checkpointed_adapter

    path = local_path(source)
    if (path / LIBRARY).is_file():
        raise UsageError(f"{source}: a library; `loragen library copy` copies one into another")
    adapter = read_checkpointed_adapter(path)
    check_ba(adapter.config, adapter.tensors, source)
    warn_of_config(adapter.config, source)
    base = options.base_model or adapter.config.get("base_model_name_or_path")
    if not base:
        raise UsageError(f"{source}: its base model is not recorded; give --base-model")
    adapter = replace(
        adapter, config=adapter.config | {"base_model_name_or_path": absolute_base(base)}
    )
    entry, run = read_entry(path), None
    with suppress(UsageError, OtherRunError):  # an adapter of no run
        run = Run.open(path, LoraManifest)
    if run and run.manifest.status != "success":
        log.warning("%s: not finished; its last checkpoint is added", run.directory)
    fingerprint = str(adapter.lineage.get("base_fingerprint", ""))
    if entry:
        fingerprint = entry.base_fingerprint
    elif run and run.config.base_quantization != "none":
        fingerprint = ""  # it is not that of the weights
    usual = run.manifest.dataset.name if run else str(adapter.lineage.get("dataset", ""))
    name = file_name(options.name or (path.name if entry else usual) or Path(source).name)
    own = adapter.directory / CARD if adapter.directory else None
    if own and own.is_file() and not (options.base_model or options.license_id):
        card = card_in(own.parent, source)
    else:
        card = export_card(
            adapter, Path(name), license_id=options.license_id, command="library add"
        )
    dataset = _prompts_of(source, path, entry, run, options)
    of_run = run is not None and not (entry or options.prompts)
    documents = _documents(dataset, options.answers, skip_bad_rows=of_run)
    return _Candidate(name, adapter, documents, card, fingerprint)


def _prompts_of(
    source: str, path: Path, entry: LibraryEntry | None, run: LoraRun | None, options: AddOptions
) -> Dataset:
    """Returns the dataset of an adapter. Raises UsageError if it is missing or not known, DataError
    if it has changed since the run."""
    hint = "give --prompts FILE"
    if options.prompts is not None:
        dataset = Dataset.at(options.prompts)
        if dataset.is_missing:
            raise UsageError(f"--prompts: {options.prompts}: no such file")
        return dataset
    if entry:
        return Dataset(path / PROMPTS)
    if run is None or not run.manifest.dataset.path:
        raise UsageError(f"{source}: the prompts that it was trained on are not known; {hint}")
    dataset = Dataset.at(run.manifest.dataset.path)
    if dataset.is_missing:
        raise UsageError(f"{source}: its dataset {dataset} is missing; {hint}")
    if dataset.sha256 != run.manifest.dataset.sha256:
        raise DataError(f"{source}: its dataset {dataset} has changed since the run; {hint}")
    return dataset


def _documents(
    dataset: Dataset, answers: bool = True, skip_bad_rows: bool = False
) -> list[dict[str, Any]]:
    """Returns what is stored of a dataset: its rows, in the format `prompt/response`, by which they
    are read as the same rows; or prompts alone, without `answers` and where not all rows have one.
    A run has skipped bad rows. Raises DataError (file:line) for those of other datasets."""

    def document(row: Row) -> dict[str, Any]:
        response = [row.response, *row.also_right] if row.also_right else row.response
        more = (("system", row.system), ("history", row.history), ("choices", row.choices))
        found = {"prompt": row.prompt, "response": response}
        return found | {key: value for key, value in more if value}

    if dataset.has_labels and (skip_bad_rows or not dataset.bad_rows):
        rows = dataset.rows(skip_bad_rows)
        return [document(row) if answers else {"prompt": row.prompt} for row in rows]
    return [{"prompt": prompt} for prompt in dataset.prompts(skip_bad_rows, of_rows=skip_bad_rows)]


def _write_entry(
    directory: Path, place: str, candidate: _Candidate, centres: Centres
) -> LibraryEntry:
    """Writes the directory of an adapter, as it will be in the library at `place`."""
    from loragen.core.adapter.checks import module_scaling
    from loragen.core.adapter.export import own_tokenizer
    from loragen.core.adapter.files import tensors_hash, write_adapter
    from loragen.core.adapter.layout import NO_LAYER, Layout

    adapter = candidate.adapter
    at = f"{place}/{candidate.name}" if on_hub(place) else place
    card = candidate.card.replace(f'"{PLACE}"', load_address(at))
    write_adapter(directory, adapter, card, own_tokenizer(adapter))
    rows = candidate.documents
    text = "".join(f"{json.dumps(one, ensure_ascii=False)}\n" for one in rows)
    write_text(directory / PROMPTS, text)
    fingerprint, centre = candidate.centre or ("", [])
    if fingerprint != centres.record.fingerprint:
        centre = centres([row["prompt"] for row in rows])
    layout = Layout.of(adapter.tensors, token_dim=1)
    scalings = {spec.path: module_scaling(adapter.config, spec.path) for spec in layout.tensors}
    entry = LibraryEntry(
        added=datetime.now(UTC).isoformat(timespec="seconds"),
        base_model=adapter.config["base_model_name_or_path"],
        base_fingerprint=candidate.base_fingerprint,
        rank=adapter.config["r"],
        scaling=listing([f"{value:g}" for value in sorted(set(scalings.values()))]),
        modules=sorted({spec.module for spec in layout.tensors}),
        layers=len({spec.layer for spec in layout.tensors} - {NO_LAYER}),
        values=layout.values,
        layout=sha256_text(*(f"{s.key} {s.shape} {scalings[s.path]}" for s in layout.tensors)),
        weights=tensors_hash(adapter.tensors),
        prompts=len(rows),
        answers=all("response" in row for row in rows),
        prompts_sha256=sha256_text(text),
        centre=centre,
        chat_template_kwargs=adapter.chat_template_kwargs,
        lineage=adapter.lineage,
        files=hashes(directory),
    )
    lines = (f"  {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in entry)
    write_text(directory / ENTRY, "{\n" + ",\n".join(lines) + "\n}\n")  # a centre on one line
    return entry


# ---------------------------------------------------------------------------- changes


def add_adapters(
    place: str,
    sources: Sequence[str],
    options: AddOptions | None = None,
    *,
    force: bool = False,
    private: bool = False,
) -> Changes:
    """Adds adapters to a library, which is made if there is none: all of them, or none if one does
    not fit.

    Raises UsageError if something is missing, a name is taken (without `force`) or nothing can be
    written; DataError for adapters of another base or layout than the others.
    """
    options = options or AddOptions()
    sources = [one for source in sources for one in _single(source)]
    if len(sources) > 1 and (options.name or options.prompts):
        raise UsageError("--name and --prompts are of one adapter; add it alone")
    record = _writable(place)
    centres = Centres.by(record, place, options.encoder, options.encoder_options)
    candidates = (_candidate(source, options) for source in sources)
    return _put(place, candidates, centres, force, private)


def copy_adapters(
    source: str,
    place: str,
    names: Sequence[str] = (),
    *,
    force: bool = False,
    private: bool = False,
) -> Changes:
    """Copies adapters of a library, all if none is named, into another one, which is made if there
    is none. Centres of another encoder than that of the target are computed again.

    Raises as `AdapterLibrary.open` and `add_adapters`.
    """
    from loragen.core.adapter.files import read_adapter

    wanted = [f"{name}/*" for name in names] or ["*"]
    library = AdapterLibrary.open(source, (*RECORDS, *wanted))
    chosen = library.chosen(names or list(library.entries))
    if not chosen:
        raise UsageError(f"{source}: no adapters in it")
    assert library.record is not None  # `open` has checked it
    own = library.record.encoder
    record = _writable(place)
    candidates = (
        _Candidate(
            name,
            read_adapter(library.directory / name),
            _documents(Dataset(library.directory / name / PROMPTS)),
            library.card(name),
            library.entries[name].base_fingerprint,
            (own.fingerprint, library.entries[name].centre),
        )
        for name in chosen
    )
    centres = Centres(record.encoder if record else own, place)
    return _put(place, candidates, centres, force, private)


def get_adapter(place: str, name: str, output: Path, force: bool = False) -> None:
    """Writes an adapter of a library to an ordinary PEFT directory.

    Raises UsageError if it is not there, or something that must not be replaced is at `output`.
    """
    refuse_existing_adapter(output, force)
    library = AdapterLibrary.open(place, (*RECORDS, f"{name}/*"))
    library.chosen([name])
    from loragen.core.adapter.export import own_tokenizer
    from loragen.core.adapter.files import read_adapter, write_adapter

    adapter = read_adapter(library.directory / name)
    write_adapter(output, adapter, library.card(name), own_tokenizer(adapter))


def remove_adapters(place: str, names: Sequence[str]) -> None:
    """Removes adapters from a library: the files that loragen has written; others in their
    directories stay. The hub keeps them in its history.

    Raises UsageError for a name that is not there, and in a folder for a file that has changed.
    """
    if on_hub(place):
        _checked_for_writing(place)
        library = AdapterLibrary.open(place)

        def removal(current: AdapterLibrary) -> tuple[dict[str, Path | bytes], list[str]]:
            found: list[str] = []
            for name in current.chosen(names):
                own = [ENTRY, *(entry_record(current.directory / name) or {})]
                found += [f"{name}/{one}" for one in dict.fromkeys(own)]
            return {}, found

        library.chosen(names)
        _commit(place, removal, f"Remove {listing(list(names))}")
        return
    library = AdapterLibrary.open(place)
    with _locked(library.directory):
        library = AdapterLibrary.at(library.directory, place)
        chosen = library.chosen(names)
        records = {name: entry_record(library.directory / name) for name in chosen}
        for name, own in records.items():
            if own is None:
                raise DataError(f"{library.directory / name / ENTRY}: it records no files")
            for file, digest in own.items():
                path = library.directory / name / file
                if digest and path.is_file() and sha256(path) != digest:
                    raise UsageError(
                        f"{path} has changed since loragen wrote it; move it away, and then remove "
                        "the adapter"
                    )
        for name, own in records.items():
            directory = library.directory / name
            (directory / ENTRY).unlink()  # first: without it, the directory is no entry
            remove_recorded(directory, own or {})
            if others := sorted(path.name for path in directory.iterdir()):
                log.warning("%s: left there, as not of loragen: %s", directory, listing(others))
            else:
                directory.rmdir()


def _writable(place: str) -> LibraryRecord | None:
    """Returns the record of the library at a place where one can be written; None if there is none
    yet. Raises UsageError if nothing can be written there, or it is something else."""
    if on_hub(place):
        _checked_for_writing(place)
        with suppress(NotOnHub):
            return AdapterLibrary.at(local_path(place, RECORDS), place).record
        return None
    directory = local_path(place)
    refuse_file(directory)
    check_writable(directory)
    if not directory.is_dir() or (directory / LIBRARY).is_file():
        return AdapterLibrary.at(directory, place).record
    if foreign := [p.name for p in directory.iterdir() if not _may_be_beside(p.name)]:
        raise UsageError(
            f"{place}: no library, and it holds {listing(sorted(foreign), 3)}; name a new folder"
        )
    return None


def _may_be_beside(name: str) -> bool:
    """Returns whether a file may be where a library is made, such as in a clone."""
    return name.startswith(".") or name.upper().startswith(("README", "LICENSE"))


def _checked_for_writing(place: str) -> None:
    repository, revision, _ = check_source(place)
    if revision:
        raise UsageError(f"{place}: a library is written without @revision")
    check_push(repository, place)


def _put(
    place: str,
    candidates: Iterable[_Candidate],
    centres: Centres,
    force: bool,
    private: bool,
) -> Changes:
    """Writes the directories of adapters, and puts them into the library together."""
    home = tempfile.gettempdir()
    if not on_hub(place):  # where they can be renamed into place
        directory = local_path(place)
        home = str(next(p for p in (directory, *directory.absolute().parents) if p.is_dir()))
    with tempfile.TemporaryDirectory(UNFINISHED, ".library.", home) as holder:
        new, taken = dict[str, LibraryEntry](), set[str]()
        for candidate in candidates:
            name = candidate.name
            if name.casefold() in taken:  # on Windows and macOS they have one directory
                raise UsageError(f"two adapters are called {name}; add them one by one with --name")
            taken.add(name.casefold())
            new[name] = _write_entry(Path(holder) / name, place, candidate, centres)
        if on_hub(place):
            return _put_on_hub(place, Path(holder), new, centres.record, force, private)
        return _put_in_folder(place, Path(holder), new, centres.record, force)


def _put_in_folder(
    place: str,
    holder: Path,
    new: Mapping[str, LibraryEntry],
    encoder: EncoderRecord,
    force: bool,
) -> Changes:
    directory = local_path(place)
    AdapterLibrary.at(directory, place).refuse_unfit(new, encoder, force)  # before it is made
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory):
        for left in directory.glob(f".*{UNFINISHED}"):
            with suppress(OSError):
                if time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                    shutil.rmtree(left, ignore_errors=True)
        library = AdapterLibrary.at(directory, place)
        same = library.refuse_unfit(new, encoder, force)
        added = [name for name in new if name not in same]
        for name in added:
            if (directory / name).exists():
                refuse_existing(directory / name, force, entry_record)
        if library.record is None:
            if not (directory / CARD).exists():
                write_text(directory / CARD, _library_card(place, next(iter(new.values()))))
            write_json(directory / LIBRARY, LibraryRecord(encoder=encoder).model_dump())
        for name in added:
            with written_directory(directory / name, entry_record) as temporary:
                for file in (holder / name).iterdir():
                    shutil.move(file, temporary / file.name)
    return Changes(added, same)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Holds the lock of a library, for which other processes wait. On a file system without locks
    nothing is held: an adapter is still put in place as a whole."""
    lock = FileLock(directory / LOCK)
    try:
        try:
            lock.acquire(timeout=1)
        except Timeout:
            log.info("%s: waiting for another process that changes it", directory)
            lock.acquire()
    except NotImplementedError:
        pass
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise UsageError(f"{directory}: cannot be written: {error.strerror}") from None
    try:
        yield
    finally:
        lock.release()


def _put_on_hub(
    place: str,
    holder: Path,
    new: Mapping[str, LibraryEntry],
    encoder: EncoderRecord,
    force: bool,
    private: bool,
) -> Changes:
    changes = Changes()

    def addition(current: AdapterLibrary) -> tuple[dict[str, Path | bytes], list[str]]:
        same = current.refuse_unfit(new, encoder, force)
        changes.added[:] = [name for name in new if name not in same]
        changes.unchanged[:] = same
        contents: dict[str, Path | bytes] = {}
        deleted: list[str] = []
        for name in changes.added:
            paths = (path for path in (holder / name).rglob("*") if path.is_file())
            files = {path.relative_to(holder).as_posix(): path for path in paths}
            contents |= files
            old = entry_record(current.directory / name) or {}
            deleted += [f"{name}/{one}" for one in old if f"{name}/{one}" not in files]
        if current.record is None:
            card = _library_card(place, next(iter(new.values())))
            if not (current.directory / CARD).is_file():
                contents[CARD] = card.encode()
            document = LibraryRecord(encoder=encoder).model_dump()
            contents[LIBRARY] = json.dumps(document, indent=2).encode() + b"\n"
        return contents, deleted

    with suppress(NotOnHub):  # before a repository is made
        AdapterLibrary.at(local_path(place, RECORDS), place).refuse_unfit(new, encoder, force)
    url = make_repository(check_source(place)[0], private, place)
    _commit(place, addition, f"Add {listing(list(new))}")
    return replace(changes, url=url)


def _commit(
    place: str,
    change: Callable[[AdapterLibrary], tuple[dict[str, Path | bytes], list[str]]],
    message: str,
) -> None:
    """Commits what `change` makes of the newest library: contents of files, and files to delete.
    Raises LoragenError if others commit to the repository all the time."""
    repository, _, folder = check_source(place)
    inside = f"{folder}/" if folder else ""
    for _ in range(COMMITS):
        head = newest_commit(repository, place)
        at = f"hf://{repository}@{head}" + (f"/{folder}" if folder else "")
        current = AdapterLibrary(place, Path(os.devnull), None, {})
        with suppress(NotOnHub):
            current = AdapterLibrary.at(local_path(at, (*RECORDS, CARD)), place)
        contents, deleted = change(current)
        if not contents and not deleted:
            return
        with suppress(Outdated):
            commit(
                repository,
                {f"{inside}{path}": content for path, content in contents.items()},
                [f"{inside}{path}" for path in deleted],
                message,
                place,
                head,
            )
            return
    raise LoragenError(f"{place}: others change it all the time; try again")


def _library_card(place: str, entry: LibraryEntry) -> str:
    """Returns the README.md of a library, in which it is named by its place on the hub alone."""
    from loragen.core.adapter.export import describe_base, front_matter

    repository, _, folder = check_source(place) if on_hub(place) else ("", None, "")
    name = (folder or repository).rpartition("/")[2] or local_path(place).absolute().name
    here = place if on_hub(place) else "."
    front = front_matter(entry.base_model, tags=("adapter-library",))
    return f"""{front}
# {name}

A library of LoRA adapters for {describe_base(entry.base_model)}, written by `loragen library`. \
Every folder is a PEFT adapter with its card, the prompts that it was trained on \
(`{PROMPTS}`) and a record of it (`{ENTRY}`).

```
loragen library list {here}
loragen library get {here} NAME --output DIR
loragen gen train --checkpoint-dir {here}
```
"""
