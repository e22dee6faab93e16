"""The sources of a training as arrays on disk: tokenised checkpoints and embedded prompts.

They are stored in a cache that may be deleted at any time. Its keys are hashes of the contents and
of the versions of the code that computes the arrays. Of several processes, such as those of DDP,
one writes an array and the others wait for it.
"""

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from loragen.core.adapter import weights_in
from loragen.core.adapter.algebra import in_form
from loragen.core.adapter.layout import PACKING_VERSION, Layout
from loragen.core.base.load import best_device
from loragen.core.config.schema import GenTrainConfig
from loragen.core.errors import DataError
from loragen.core.files import (
    crc32,
    remove_unfinished,
    reserve,
    sha256,
    sha256_text,
    write_text,
    written_atomically,
)
from loragen.core.generator.embeddings import write_embeddings
from loragen.core.generator.network import Normalization
from loragen.core.learning.plan import Plan
from loragen.core.learning.sources import TrainingSource, open_sources
from loragen.core.learning.texts import LabelledRows, labelled_rows, texts_of
from loragen.core.outputs import is_writable
from loragen.core.plugins import create, describe, find
from loragen.core.protocols import Encoder, Transfers
from loragen.core.run.directory import SourceRecord

log = logging.getLogger(__name__)

CACHE_VERSION = 3
"""Part of all keys of the cache: a change of what this module stores raises it."""
MIN_SAMPLES = 64
MAX_AVERAGED = 4  # checkpoints averaged to one sample: enough to reduce the noise of a single one


@dataclass(frozen=True, eq=False)  # arrays have no truth value
class SourceArrays:
    """A source as memory-mapped arrays, so that memory does not grow with its size."""

    name: str
    tokens: np.ndarray
    """``[checkpoints, tokens, token_dim]`` float32"""
    embeddings: np.ndarray
    """``[texts, positions, dim]`` float32"""
    mask: np.ndarray
    """``[texts, positions]`` bool"""
    train_texts: Sequence[int]
    """Indices of the texts to learn from."""
    val_texts: Sequence[int] = ()
    """Indices of the texts held out for validation."""
    tracked: Sequence[Sequence[int]] | None = None
    """For each checkpoint the indices of its own texts; None: it is paired with any text."""
    texts: Sequence[str] = ()
    """The texts themselves if the encoder is trained, as it reads them at every step; `embeddings`
    and `mask` then have no positions. Empty if the embeddings are precomputed."""
    rows: LabelledRows | None = None
    """Tokenised labelled rows, if an objective needs the base model."""
    prompts_sha256: str = ""
    """A hash of all prompts, which the sources of one dataset share."""
    record: SourceRecord | None = None
    """The entry in the manifest."""
    mean: np.ndarray | None = None
    """``[tokens, token_dim]`` float32: the mean of the checkpoints; None if the decoder combines no
    adapters."""

    def texts_of(self, checkpoint: int) -> Sequence[int]:
        """Returns the indices of the texts that a checkpoint may be paired with."""
        return self.train_texts if self.tracked is None else self.tracked[checkpoint]


@contextmanager
def source_arrays(
    plan: Plan, encoder: Encoder, tokenizer: Any = None
) -> Iterator[tuple[list[SourceArrays], list[SourceArrays]]]:
    """Yields the arrays of the training sources and of the held-out ones, cached if possible.

    With the base's `tokenizer`, they have labelled rows. Raises UsageError if those of a source are
    missing, DataError for a checkpoint that does not fit the layout.
    """
    config, sources = plan.config, [*plan.sources, *plan.val_sources]
    rows: list[LabelledRows | None] = [None] * len(sources)
    if tokenizer is not None:
        length, seed = config.behaviour.max_length, config.seed
        for i, source in enumerate(sources):
            if i < len(plan.sources):
                val_prompts = [prompt for group in source.groups.val for prompt in group]
                rows[i] = labelled_rows(source, val_prompts, tokenizer, length, seed)
            elif source.has_labels:
                found = labelled_rows(source, [], tokenizer, length, seed)
                rows[i] = LabelledRows([], found.training, found.longest)
    with _cache(config) as cache:
        arrays = []
        for i, source in enumerate(sources):
            texts, own = texts_of(source), rows[i]
            embeddings, mask = _embedded(cache, encoder, config, texts.texts)
            key, tokens, mean = _tokenized(cache, plan.layout, source, config)
            record = SourceRecord(
                name=source.name,
                checkpoints=key,
                prompts=texts.sha256,
                labels=own.sha256 if own else "",
                held_out=i >= len(plan.sources),
                place=str(source.directory),
                prompts_from=source.prompts_from,
                count=len(source.checkpoints),
            )
            arrays.append(
                SourceArrays(
                    source.name,
                    tokens,
                    embeddings,
                    mask,
                    train_texts=sorted({*range(len(texts.texts))} - {*texts.val_texts}),
                    val_texts=texts.val_texts,
                    tracked=texts.tracked,
                    texts=() if encoder.frozen else texts.texts,
                    rows=own,
                    prompts_sha256=source.prompts_sha256,
                    record=record,
                    mean=mean,
                )
            )
            source.release()
        yield arrays[: len(plan.sources)], arrays[len(plan.sources) :]


def embed_prompts_ahead(config: GenTrainConfig) -> None:
    """Embeds the prompts of the sources that exist so far into the cache, from which the
    `source_arrays` of a later training reads them.

    Raises UsageError or DataError for sources that do not fit.
    """
    with _cache(config) as cache:
        if cache.spare is None:
            encoder: Encoder = create("encoder", config.encoder.name, config.encoder.options)
            for source in open_sources(config).training:
                _embedded(cache, encoder, config, texts_of(source).texts)


@dataclass(frozen=True)
class _Cache:
    """The places of arrays: the configured directory, and a temporary one for what that does not
    have and cannot take."""

    directory: Path | None
    spare: Path | None

    def files(self, *names: str) -> list[Path]:
        """Returns the paths of files that are written together."""
        kept = [self.directory / name for name in names] if self.directory else []
        if self.spare is None or (kept and _intact(kept)):
            return kept
        return [self.spare / name for name in names]


@contextmanager
def _cache(config: GenTrainConfig) -> Iterator[_Cache]:
    directory = Path(config.data.cache_dir) if config.data.cache_tokenized else None
    if directory and is_writable(directory, "what the cache lacks is computed for this command"):
        yield _Cache(directory, None)
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as spare:
        yield _Cache(directory, Path(spare))


def _tokenized(
    cache: _Cache, layout: Layout, source: TrainingSource, config: GenTrainConfig
) -> tuple[str, np.ndarray, np.ndarray | None]:
    """Returns a hash of the checkpoints in this layout and form, which the manifest records, their
    tokens, and the mean of these if the decoder combines adapters."""
    weights = (weights_in(file) or file for file in source.checkpoints)
    form = config.layout.target_form
    key = sha256_text(repr(layout.state()), form, *map(sha256, weights))[:32]
    versions = f"{CACHE_VERSION} {PACKING_VERSION}"
    stem = f"tokens/{sha256_text(key, versions)[:32]}"
    (file,) = cache.files(f"{stem}.npy")
    shape = (len(source.checkpoints), layout.tokens, layout.token_dim)

    def write() -> None:
        with written_atomically(file) as temporary:
            array = np.lib.format.open_memmap(temporary, "w+", np.float32, shape)
            reserve(temporary)
            for row, checkpoint in enumerate(source.checkpoints):
                adapter = source.read(checkpoint)
                try:
                    layout.check(adapter.tensors)
                except DataError as error:
                    raise DataError(f"{checkpoint}: {error}") from None
                array[row] = layout.pack(in_form(adapter.tensors, form)).float().numpy()
                if not np.isfinite(array[row]).all():
                    raise DataError(f"{checkpoint}: some values are too large for float32")
            array.flush()
            del array

    write_once([file], write)
    tokens: np.ndarray = np.load(file, mmap_mode="r")
    if not issubclass(find("decoder", config.decoder.name), Transfers):
        return key, tokens, None

    def write_mean() -> None:
        with written_atomically(mean) as temporary, temporary.open("wb") as stream:
            np.save(stream, tokens.mean(axis=0, dtype=np.float64).astype(np.float32))

    (mean,) = cache.files(f"{stem}.mean.npy")
    write_once([mean], write_mean)
    return key, tokens, np.load(mean, mmap_mode="r")


def _embedded(
    cache: _Cache, encoder: Encoder, config: GenTrainConfig, texts: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns embeddings and mask; they have no positions if the encoder is trained."""
    if not encoder.frozen:
        return np.zeros((len(texts), 0, encoder.dim), np.float32), np.zeros((len(texts), 0), bool)
    described = config.encoder.name, repr(config.encoder.options), encoder.fingerprint
    plugin = describe("encoder", config.encoder.name)
    versions = [f"{name} {version(name)}" for name in getattr(encoder, "libraries", ())]
    code = sha256_text(str(CACHE_VERSION), plugin.origin, *versions)
    stem = f"embeddings/{sha256_text(code, sha256_text(*described), *texts)[:32]}"
    files = cache.files(f"{stem}.npy", f"{stem}.mask.npy")
    device = torch.device("cpu") if config.trainer.accelerator == "cpu" else best_device()
    write_once(files, lambda: write_embeddings(encoder, texts, files[0], files[1], device))
    return np.load(files[0], mmap_mode="r"), np.load(files[1], mmap_mode="r")


def write_once(files: Sequence[Path], write: Callable[[], None]) -> None:
    """Calls `write` unless the files, of one folder, are there as they were written, which their
    checksums beside them tell. Of several processes one writes and the others wait for it. What a
    process that was killed has left is removed."""
    if _intact(files):
        return
    folder, first = files[0].parent, files[0].name[0]
    folder.mkdir(parents=True, exist_ok=True)
    # A lock for all files with the same first digit of their key: two trainings that share a cache
    # rarely wait for each other, and there are never more than 16 locks.
    lock = FileLock(folder.with_name(f".{folder.name}-{first}.lock"))
    try:
        lock.acquire(timeout=1)
    except Timeout:
        _say_waiting(folder)
        lock.acquire()
    try:
        remove_unfinished(folder, f".{first}*.*")  # no other process writes these
        if not _intact(files):
            if all(file.is_file() for file in files):
                log.warning("%s: damaged or incomplete; it is written again", files[0])
            write()
            for file in files:
                write_text(_checksum_file(file), f"{crc32(file)}\n")
    finally:
        lock.release()


@lru_cache
def _say_waiting(folder: Path) -> None:
    """Says once in a process that it waits."""
    log.info("%s: waiting for another process that writes there", folder)


def _intact(files: Sequence[Path]) -> bool:
    """Returns whether the files are there with the bytes that were written."""
    pairs = [(file, _checksum_file(file)) for file in files]
    if not all(file.is_file() and checksum.is_file() for file, checksum in pairs):
        return False
    return all(crc32(file).encode() == checksum.read_bytes().strip() for file, checksum in pairs)


def _checksum_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.crc32")


class AdapterSamples:
    """Normalised example adapters ``[samples, tokens, token_dim]``, equally many of every dataset.

    There are `MIN_SAMPLES` of them at least, and one of each dataset. A sample is the mean of a few
    checkpoints, evenly spaced. `samples[first:last]` reads only those tokens from disk.
    """

    def __init__(self, collections: Sequence[np.ndarray], normalization: Normalization) -> None:
        """`collections` are the datasets' checkpoints ``[checkpoints, tokens, token_dim]``."""
        self.normalization = normalization
        each = ceil(MIN_SAMPLES / len(collections))
        self._groups: list[tuple[np.ndarray, np.ndarray]] = []
        for collection in collections:
            count = min(each, len(collection))
            for group in np.array_split(np.arange(len(collection)), count):
                spaced = np.linspace(len(group) - 1, 0, min(MAX_AVERAGED, len(group))).round()
                self._groups.append((collection, group[spaced.astype(np.int64)]))

    @property
    def shape(self) -> tuple[int, int, int]:
        tokens, token_dim = self.normalization.mean.shape
        return len(self._groups), tokens, token_dim

    def __getitem__(self, tokens: slice) -> Tensor:
        found = [
            # The float64 mean of equal float32 values is that value, whatever their number, so that
            # what is the same in all adapters is so in all samples.
            np.mean([collection[c, tokens] for c in group], axis=0, dtype=np.float64)
            for collection, group in self._groups
        ]
        mean, scale = self.normalization.mean[tokens], self.normalization.scale[tokens]
        return (torch.from_numpy(np.stack(found).astype(np.float32)) - mean) / scale


def conditions(encoder: Encoder, texts: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
    """Encodes the texts of each condition, with gradients, if the encoder is trained.

    Returns ``[batch, prompts, positions, dim]`` and the mask ``[batch, prompts, positions]``; a
    text that several conditions share is encoded once.
    """
    index = {text: i for i, text in enumerate(dict.fromkeys(t for row in texts for t in row))}
    embeddings, mask = encoder(list(index))  # (texts, positions, dim), (texts, positions)
    chosen = [[index[text] for text in row] for row in texts]
    return (
        pad_sequence([embeddings[row] for row in chosen], batch_first=True),
        pad_sequence([mask[row] for row in chosen], batch_first=True),
    )


def embedded(
    encoder: Encoder, sources: Sequence[SourceArrays]
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yields name, embeddings ``[texts, positions, dim]`` and mask ``[texts, positions]`` of each
    source, memory-mapped.

    An encoder that is not frozen embeds the texts now, into temporary files, one source at a time.
    """
    for source in sources:
        if not source.texts:
            yield source.name, source.embeddings, source.mask
            continue
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            files = [Path(folder) / "embeddings.npy", Path(folder) / "mask.npy"]
            write_embeddings(encoder, source.texts, files[0], files[1])
            embeddings, mask = (np.load(file, mmap_mode="r") for file in files)
            yield source.name, embeddings, mask
