"""A library of adapters, which a team shares: in a folder, or in a repository of the hub. Light.

Every adapter has a directory of its own: a PEFT adapter with its card, the prompts that it was
trained on, and a record with the centre of their embeddings. There is no list beside them that two
processes could overwrite. All adapters of a library are for one base and have one layout, so that a
generator can learn from them.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, FiniteFloat

from loragen.core.adapter import CARD
from loragen.core.contents import read_json, record_of
from loragen.core.data.dataset import Dataset
from loragen.core.data.prompts import joined_text, random_groups, text_key
from loragen.core.errors import DataError, UsageError, did_you_mean, listing
from loragen.core.files import natural_key
from loragen.core.hub import PLACE, NotOnHub, check_source, local_path, on_hub
from loragen.core.outputs import BESIDE, Record, recorded_in_json

FORMAT_VERSION = 1
LIBRARY, ENTRY, PROMPTS = "library.json", "entry.json", "prompts.jsonl"
RECORDS = (LIBRARY, f"*/{ENTRY}")
"""The files of a library that are read before any adapter."""
PROMPTS_PER_TEXT = 4
"""As `data.samples_per_prompt` of `gen train` by default."""
MOST_TEXTS = 256
"""A centre is the mean of at most so many texts, drawn at random."""


class EncoderRecord(BaseModel):
    """The encoder of a library's centres."""

    name: str
    options: dict[str, Any] = {}
    fingerprint: str
    """The hash of its weights."""


class LibraryRecord(BaseModel):
    """The content of library.json."""

    format_version: int = FORMAT_VERSION
    kind: Literal["library"] = "library"
    encoder: EncoderRecord


class LibraryEntry(BaseModel):
    """The content of entry.json: what is known of an adapter without reading it. Its name is that
    of its directory."""

    format_version: int = FORMAT_VERSION
    kind: Literal["library entry"] = "library entry"
    added: str
    base_model: str
    base_fingerprint: str = ""
    """The hash of the base's weights; empty if it is not known."""
    rank: int
    scaling: str
    """The factor of BA, `lora_alpha / r`; several if modules differ."""
    modules: list[str]
    """The modules of a layer that have an adapter."""
    layers: int
    values: int
    layout: str
    """A hash of the names, shapes and scalings of all tensors."""
    weights: str
    """A hash of the tensors."""
    prompts: int
    answers: bool
    """Whether prompts.jsonl also has the answers."""
    prompts_sha256: str
    """Of prompts.jsonl."""
    centre: list[FiniteFloat]
    """``[dim]``: the mean embedding of the prompts, joined in texts."""
    chat_template_kwargs: dict[str, Any] = {}
    lineage: dict[str, Any] = {}
    files: dict[str, str]
    """The hashes of the other files of its directory."""

    @property
    def dataset(self) -> str:
        """The name of the dataset that it was trained on, if that is known."""
        return str(self.lineage.get("dataset", ""))

    def same_base(self, other: Self) -> bool:
        """Returns whether the bases have the same weights or, if those are not known of both, the
        same name."""
        if self.base_fingerprint and other.base_fingerprint:
            return self.base_fingerprint == other.base_fingerprint
        return self.base_model == other.base_model

    def difference(self, other: Self) -> str | None:
        """Returns what keeps two adapters from being in one library; None if nothing does."""
        if not self.same_base(other):
            if self.base_model == other.base_model:
                return f"its base {self.base_model} had other weights"
            return f"its base is {self.base_model}, not {other.base_model}"
        for what in ("rank", "modules", "layers", "scaling"):
            own, theirs = getattr(self, what), getattr(other, what)
            if own != theirs:
                shown = [listing(v) if isinstance(v, list) else v for v in (own, theirs)]
                return f"its {what}: {shown[0]}, not {shown[1]}"
        return None if self.layout == other.layout else "its tensors have other names or shapes"


def entry_record(directory: Path) -> Record | None:
    """Returns the record of an adapter's directory in a library."""
    return recorded_in_json(directory, ENTRY)


def read_entry(directory: Path) -> LibraryEntry | None:
    """Returns the record of a directory in a library; None if it is none. Raises DataError if it is
    damaged or of a newer loragen."""
    file = directory / ENTRY
    return _read(file, LibraryEntry) if file.is_file() else None


def library_entries(directory: Path) -> dict[str, LibraryEntry] | None:
    """Returns the adapters of the library in a directory of this machine; None if it is none.
    Raises DataError as `read_entry`."""
    is_library = (directory / LIBRARY).is_file()
    return AdapterLibrary.at(directory).entries if is_library else None


def _read(file: Path, kind: type[Any]) -> Any:
    return record_of(read_json(file), kind, file, "of a library of adapters")


@dataclass(frozen=True)
class Listed:
    """An adapter in a list, with the similarity of its prompts to given ones (a cosine)."""

    name: str
    entry: LibraryEntry
    similarity: float | None = None


# ---------------------------------------------------------------------------- a library


@dataclass
class AdapterLibrary:
    """A library as it was read."""

    place: str
    """As it was named: a folder, or `hf://owner/name`."""
    directory: Path
    """Where its files are on this machine."""
    record: LibraryRecord | None
    """None if there is no library yet."""
    entries: dict[str, LibraryEntry]

    @classmethod
    def open(cls, place: str, only: Sequence[str] = RECORDS) -> "AdapterLibrary":
        """Opens a library; of one on the hub, the files that match `only` are fetched. Raises
        UsageError if there is none, DataError if a record of it is damaged."""
        try:
            directory = local_path(place, tuple(only))
        except NotOnHub as error:
            if LIBRARY in str(error):
                raise UsageError(f"{place}: no library (it has no {LIBRARY})") from None
            raise
        found = cls.at(directory, place)
        if found.record is None:
            missing = f"it has no {LIBRARY}" if directory.is_dir() else "no such directory"
            raise UsageError(f"{place}: no library ({missing}); `loragen library add` makes one")
        return found

    @classmethod
    def at(cls, directory: Path, place: str | None = None) -> "AdapterLibrary":
        """Reads what is in a directory, which may be no library."""
        file = directory / LIBRARY
        record = _read(file, LibraryRecord) if file.is_file() else None
        entries = {}
        for one in directory.glob(f"*/{ENTRY}"):
            with suppress(FileNotFoundError):  # somebody has just removed it
                if not one.parent.name.startswith(".") and (found := read_entry(one.parent)):
                    entries[one.parent.name] = found
        ordered = dict(sorted(entries.items(), key=lambda item: natural_key(item[0])))
        return cls(place or str(directory), directory, record, ordered)

    def listed(self, like: str | None = None) -> list[Listed]:
        """Returns the adapters by name, or the most similar to the prompts `like` (a file, or a
        dataset on the hub) first. Raises UsageError or DataError for prompts that cannot be read,
        and if the library's encoder is another one here."""
        found = [Listed(name, entry) for name, entry in self.entries.items()]
        if like is None or not found:
            return found
        import torch

        dataset = Dataset.at(like)
        if dataset.is_missing:
            raise UsageError(f"--like: {like}: no such file")
        prompts = dataset.prompts()
        assert self.record is not None  # `open` has checked it
        wanted = torch.tensor(Centres(self.record.encoder, self.place)(prompts))
        by_similarity = [
            replace(one, similarity=_cosine(wanted, torch.tensor(one.entry.centre)))
            for one in found
        ]
        return sorted(by_similarity, key=lambda one: -(one.similarity or 0.0))

    def chosen(self, names: Sequence[str]) -> list[str]:
        """Returns the names, without repetitions. Raises UsageError for one that is not there."""
        for name in names:
            if name not in self.entries:
                raise UsageError(
                    f"{self.place}: no adapter '{name}' in it.{did_you_mean(name, self.entries)} "
                    f"It has: {listing(list(self.entries))}"
                )
        return list(dict.fromkeys(names))

    def card(self, name: str) -> str:
        """Returns the card of an adapter, with `"PLACE"` as the place to load from."""
        at = f"{self.place}/{name}" if on_hub(self.place) else self.place
        return card_in(self.directory / name, at)

    def refuse_unfit(
        self, new: Mapping[str, LibraryEntry], encoder: EncoderRecord, force: bool
    ) -> list[str]:
        """Returns those of the new adapters that the library has already, as they are. Raises
        UsageError for an encoder that is not the library's and a name that is taken, DataError,
        which names all of them, for adapters that do not fit the others."""
        if self.record and self.record.encoder.fingerprint != encoder.fingerprint:
            raise UsageError(
                f"{self.place}: its centres are of the encoder {self.record.encoder.name}, and "
                f"these of {encoder.name} or of other weights of it"
            )
        same = []
        for name, entry in new.items():
            old = self.entries.get(name)
            if old and (old.weights, old.prompts_sha256, old.base_model) == (
                entry.weights,
                entry.prompts_sha256,
                entry.base_model,
            ):
                same.append(name)
                continue
            taken = next((n for n in self.entries if n.casefold() == name.casefold()), None)
            if taken and not (force and taken == name):
                raise UsageError(
                    f"{self.place} has an adapter {taken} already; --name gives this one another "
                    "name, --force replaces that one"
                )
        replaced = new.keys() - {*same}
        others = {n: entry for n, entry in self.entries.items() if n not in replaced} | dict(new)
        first, reference = next(iter(others.items()))
        unfit = {name: entry.difference(reference) for name, entry in new.items()}
        if problems := [f"{n}: {why} (as {first})" for n, why in unfit.items() if why]:
            raise DataError(
                *(f"{one}: the adapters of a library have one base and layout" for one in problems)
            )
        return same


def _cosine(one: Any, other: Any) -> float:
    from torch.nn.functional import cosine_similarity

    return round(float(cosine_similarity(one, other, dim=0)), 4)


def load_address(place: str) -> str:
    """Returns the arguments of `from_pretrained` that load the adapter at a place on the hub; in a
    folder, a card does not know its place."""
    if not on_hub(place):
        return f'"{PLACE}"'
    repository, _, folder = check_source(place)
    return f'"{repository}", subfolder="{folder}"' if folder else f'"{repository}"'


def card_in(directory: Path, place: str | Path) -> str:
    """Returns the card of an adapter, without the record of its files, and with `"PLACE"` for the
    place to load from."""
    file = directory / CARD
    text = file.read_text(encoding="utf-8") if file.is_file() else f"# {directory.name}\n"
    text = text.partition(f"\n\n<!-- {BESIDE}")[0]
    return text.replace(load_address(str(place)), f'"{PLACE}"')


# ---------------------------------------------------------------------------- centres


class Centres:
    """Computes centres by one encoder, which is loaded when it is first needed."""

    def __init__(self, encoder: EncoderRecord, place: str) -> None:
        """`place` is that of the library whose encoder it is."""
        self.record, self.place = encoder, place
        self._encoder: Any = None

    def __call__(self, prompts: Sequence[str]) -> list[float]:
        """Returns the mean embedding of the prompts, in texts of `PROMPTS_PER_TEXT` as `gen train`
        joins them. Raises UsageError if the encoder has other weights than the recorded ones."""
        from loragen.core.base.load import best_device
        from loragen.core.generator.embeddings import mean_embedding

        distinct = {text_key(prompt): prompt for prompt in reversed(prompts)}
        groups = random_groups(list(distinct.values())[::-1], PROMPTS_PER_TEXT, seed=0)
        texts = [joined_text(group) for group in groups[:MOST_TEXTS]]
        found: list[float] = mean_embedding(self.encoder, texts, best_device()).tolist()
        return [round(value, 7) for value in found]

    @property
    def encoder(self) -> Any:
        if self._encoder is None:
            self._encoder = _encoder(self.record.name, self.record.options)
            if self._encoder.fingerprint != self.record.fingerprint:
                raise UsageError(
                    f"{self.place}: the encoder {self.record.name} has other weights here than "
                    "when the library was made"
                )
        return self._encoder

    @classmethod
    def by(
        cls,
        record: LibraryRecord | None,
        place: str,
        name: str | None,
        options: Mapping[str, Any] | None,
    ) -> "Centres":
        """Returns those of a library, or of a new one, by the encoder that is named, `sbert` if
        none is. Raises UsageError if that is not the library's."""
        if record and name is None and options is None:
            return cls(record.encoder, place)
        name = name or (record.encoder.name if record else "sbert")
        encoder = _encoder(name, options or {})
        if record and encoder.fingerprint != record.encoder.fingerprint:
            raise UsageError(
                f"{place}: its centres are of the encoder {record.encoder.name}, of other weights "
                f"or options than the {name} that is given"
            )
        found = cls(
            EncoderRecord(name=name, options=dict(options or {}), fingerprint=encoder.fingerprint),
            place,
        )
        found._encoder = encoder
        return found


def _encoder(name: str, options: Mapping[str, Any]) -> Any:
    from loragen.core.base.load import quiet_libraries
    from loragen.core.plugins import create

    quiet_libraries()
    return create("encoder", name, options)
