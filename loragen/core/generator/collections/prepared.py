"""Collections as arrays on disk: checkpoints in tokens, prompts embedded, from a cache that may be
deleted at any time."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loragen.core.checkpoints import read_tensors
from loragen.core.config.gen_schema import GenData, GenTrainConfig
from loragen.core.errors import DataError
from loragen.core.files import sha256, sha256_text, written_atomically
from loragen.core.generator.collections.embeddings import write_embeddings
from loragen.core.generator.collections.sources import Collection, texts_of
from loragen.core.generator.layout import Layout
from loragen.core.generator.targets import TargetForm, in_form
from loragen.core.manifests import SourceRecord
from loragen.core.protocols import Encoder


@dataclass(frozen=True)
class PreparedSource:
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
    sources: Sequence[Collection],
    layout: Layout,
    encoder: Encoder,
    encoder_key: str,
    config: GenTrainConfig,
) -> Iterator[list[PreparedSource]]:
    """Tokenised checkpoints and embedded prompts, from the cache where they are there already."""
    with _cache(config.data) as cache:
        ready = []
        for source in sources:
            of = texts_of(source, config)
            embeddings, mask = _embedded(cache, encoder, encoder_key, of.texts)
            key = _tokens_key(layout, source, config.layout.target_form)
            tokens = _tokenized(cache, key, layout, source, config.layout.target_form)
            ready.append(
                PreparedSource(
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
    sources: Sequence[Collection], encoder: Encoder, encoder_key: str, config: GenTrainConfig
) -> None:
    """Puts the embeddings of the sources' prompts into the cache, where `prepared` finds them."""
    if config.data.cache_tokenized:
        for source in sources:
            texts = texts_of(source, config).texts
            _embedded(Path(config.data.cache_dir), encoder, encoder_key, texts)


def _record(source: Collection, checkpoints: str, prompts: str) -> SourceRecord:
    record = SourceRecord(name=source.name, checkpoints=checkpoints, prompts=prompts)
    if source.origin:
        record.place = str(source.origin.checkpoints)
        record.prompts_from = source.origin.prompts
        record.count = len(source.checkpoints)
    return record


@contextmanager
def _cache(data: GenData) -> Iterator[Path]:
    if data.cache_tokenized:
        yield Path(data.cache_dir)
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        yield Path(directory)


def _tokens_key(layout: Layout, source: Collection, form: TargetForm) -> str:
    hashes = [sha256(_weights(file)) for file in source.checkpoints]
    return sha256_text(repr(layout.state()), form, *hashes)[:32]


def _tokenized(
    cache: Path, key: str, layout: Layout, source: Collection, form: TargetForm
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
