"""Collections as arrays on disk: checkpoints in tokens, prompts embedded, from a cache that may be
deleted at any time.

Example adapters for a decoder to start from, read from the collections where asked for.

Texts -> conditions, where the encoder is trained along and nothing is embedded before.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from loragen.core.adapter.algebra import TargetForm, in_form
from loragen.core.adapter.layout import Layout
from loragen.core.config.schema import GenDataSection, GenTrainConfig
from loragen.core.errors import DataError
from loragen.core.files import sha256, sha256_text, written_atomically
from loragen.core.generator.embeddings import write_embeddings
from loragen.core.generator.network import Normalization
from loragen.core.learning.sources import TrainingSource
from loragen.core.learning.texts import texts_of
from loragen.core.protocols import Encoder
from loragen.core.run.checkpoints import read_tensors
from loragen.core.run.directory import SourceRecord


@dataclass(frozen=True)
class SourceArrays:
    """A source as arrays on disk, memory-mapped: nothing of it grows the process."""

    name: str
    tokens: np.ndarray
    """``[checkpoints, tokens, token_dim]`` float32"""
    embeddings: np.ndarray
    """``[texts, positions, dim]`` float32"""
    mask: np.ndarray
    """``[texts, positions]`` bool"""
    held_out: Sequence[int] | None = None
    """Indices of the texts that validate; None where nobody has said."""
    tracked: Sequence[Sequence[int]] | None = None
    """For each checkpoint the indices of its own texts; None where any text goes with any."""
    texts: Sequence[str] = ()
    """What an encoder that trains along reads at every step; `embeddings` and `mask` then have no
    positions. Empty where the embeddings are there."""
    dataset: str = ""
    """A hash that the sources of one dataset share."""
    record: SourceRecord | None = None
    """What it held, for the manifest."""


@contextmanager
def prepared(
    sources: Sequence[TrainingSource],
    layout: Layout,
    encoder: Encoder,
    encoder_key: str,
    config: GenTrainConfig,
) -> Iterator[list[SourceArrays]]:
    """Tokenised checkpoints and embedded prompts, from the cache where they are there already."""
    with _cache(config.data) as cache:
        ready = []
        for source in sources:
            of = texts_of(source, config)
            embeddings, mask = _embedded(cache, encoder, encoder_key, of.texts)
            key = _tokens_key(layout, source, config.layout.target_form)
            tokens = _tokenized(cache, key, layout, source, config.layout.target_form)
            ready.append(
                SourceArrays(
                    source.name,
                    tokens,
                    embeddings,
                    mask,
                    of.held_out,
                    of.tracked,
                    () if encoder.frozen else of.texts,
                    source.dataset,
                    _record(source, key, of.sha256),
                )
            )
        yield ready


def embed_ahead(
    sources: Sequence[TrainingSource], encoder: Encoder, encoder_key: str, config: GenTrainConfig
) -> None:
    """Puts the embeddings of the sources' prompts into the cache, where `prepared` finds them."""
    if config.data.cache_tokenized:
        for source in sources:
            texts = texts_of(source, config).texts
            _embedded(Path(config.data.cache_dir), encoder, encoder_key, texts)


def _record(source: TrainingSource, checkpoints: str, prompts: str) -> SourceRecord:
    record = SourceRecord(name=source.name, checkpoints=checkpoints, prompts=prompts)
    if source.origin:
        record.place = str(source.origin.checkpoints)
        record.prompts_from = source.origin.prompts
        record.count = len(source.checkpoints)
    return record


@contextmanager
def _cache(data: GenDataSection) -> Iterator[Path]:
    if data.cache_tokenized:
        yield Path(data.cache_dir)
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        yield Path(directory)


def _tokens_key(layout: Layout, source: TrainingSource, form: TargetForm) -> str:
    hashes = [sha256(_weights(file)) for file in source.checkpoints]
    return sha256_text(repr(layout.state()), form, *hashes)[:32]


def _tokenized(
    cache: Path, key: str, layout: Layout, source: TrainingSource, form: TargetForm
) -> np.ndarray:
    file = cache / "tokens" / f"{key}.npy"
    if not file.is_file():
        shape = (len(source.checkpoints), layout.tokens, layout.token_dim)
        with written_atomically(file) as temporary:
            array = np.lib.format.open_memmap(temporary, "w+", np.float32, shape)
            for row, checkpoint in enumerate(source.checkpoints):
                try:
                    tensors = in_form(read_tensors(checkpoint), form)
                    array[row] = layout.pack(tensors).float().numpy()
                except DataError as error:
                    raise DataError(f"{checkpoint}: {error}") from None
                if not np.isfinite(array[row]).all():
                    raise DataError(f"{checkpoint}: NaN or infinity in its weights")
            array.flush()
            del array
    tokens: np.ndarray = np.load(file, mmap_mode="r")
    return tokens


def _weights(checkpoint: Path) -> Path:
    return checkpoint / "adapter_model.safetensors" if checkpoint.is_dir() else checkpoint


def _embedded(
    cache: Path, encoder: Encoder, key: str, texts: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Without positions where the encoder trains along, and reads the texts at every step."""
    if not encoder.frozen:
        return np.zeros((len(texts), 0, encoder.dim), np.float32), np.zeros((len(texts), 0), bool)
    stem = cache / "embeddings" / sha256_text(key, *texts)[:32]
    files = [stem.with_suffix(".npy"), stem.with_suffix(".mask.npy")]
    if not all(file.is_file() for file in files):
        write_embeddings(encoder, texts, *files)
    return np.load(files[0], mmap_mode="r"), np.load(files[1], mmap_mode="r")


FEWEST_SAMPLES = 64
MOST_AVERAGED = 4  # checkpoints that make a sample: enough to see past the noise of one


class CollectionSamples:
    """Normalised adapters ``[samples, tokens, token_dim]``, equally many of every dataset.

    One of each where there are many datasets, more where there are few; a sample is the mean of a
    few checkpoints, evenly spaced. `samples[first:last]` reads those tokens alone.
    """

    def __init__(self, collections: Sequence[np.ndarray], normalization: Normalization) -> None:
        """Of collections ``[checkpoints, tokens, token_dim]``, memory-mapped."""
        self.normalization = normalization
        each = ceil(FEWEST_SAMPLES / len(collections))
        self._groups = [
            (collection, group)
            for collection in collections
            for group in np.array_split(np.arange(len(collection)), min(each, len(collection)))
        ]

        counts = [min(each, len(collection)) for collection in collections]
        self.datasets = [i for i, count in enumerate(counts) for _ in range(count)]
        """Of every sample, the dataset that it is of."""

    @property
    def shape(self) -> tuple[int, int, int]:
        tokens, token_dim = self.normalization.mean.shape
        return len(self._groups), tokens, token_dim

    def __getitem__(self, tokens: slice) -> Tensor:
        found = [
            np.mean([collection[c, tokens] for c in _spaced(group)], axis=0)
            for collection, group in self._groups
        ]
        mean, scale = self.normalization.mean[tokens], self.normalization.scale[tokens]
        return (torch.from_numpy(np.stack(found)) - mean) / scale


def _spaced(group: np.ndarray) -> np.ndarray:
    """At most `MOST_AVERAGED` of the checkpoints, the last one among them."""
    places = np.linspace(len(group) - 1, 0, min(MOST_AVERAGED, len(group))).round()
    picked: np.ndarray = group[places.astype(np.int64)]
    return picked


def conditions(encoder: Encoder, texts: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
    """The texts of each condition -> ``[batch, prompts, positions, dim]`` and the mask
    ``[batch, prompts, positions]``, with gradients; a text that several conditions share is
    encoded once."""
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
    """(name, embeddings ``[texts, positions, dim]``, mask ``[texts, positions]``) of each source,
    memory-mapped: those it has, or what a trained encoder makes of its texts now, which is there
    until the next is asked for."""
    for source in sources:
        if not source.texts:
            yield source.name, source.embeddings, source.mask
            continue
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            files = [Path(folder) / "embeddings.npy", Path(folder) / "mask.npy"]
            write_embeddings(encoder, source.texts, files[0], files[1])
            embeddings, mask = (np.load(file, mmap_mode="r") for file in files)
            yield source.name, embeddings, mask
