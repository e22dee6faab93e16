"""Where a generator learns from: the checkpoints of a dataset, and the dataset's prompts."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loragen.core.adapters import CONFIG_FILE, read_adapter
from loragen.core.checkpoints import find_checkpoints, read_tensors
from loragen.core.config.schema import GenData, GenTrainConfig
from loragen.core.config.schema import Source as SourceConfig
from loragen.core.data.documents import content_hash, parsed_source
from loragen.core.data.prompts import grouped, prompts_of_rows, read_prompts
from loragen.core.errors import DataError, UsageError
from loragen.core.files import sha256, sha256_text, written_atomically
from loragen.core.generator.layout import Layout
from loragen.core.generator.places import directory_of
from loragen.core.protocols import Encoder
from loragen.core.runs import LoraManifest, SourceRecord, read_manifest, run_directory_of


@dataclass(frozen=True)
class Source:
    """One dataset: its checkpoints, its prompts, and the adapter they are of."""

    name: str
    checkpoints: list[Path]
    prompts: list[str]
    adapter_config: dict[str, Any]
    base_model: str


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
    record: SourceRecord | None = None
    """What it held, for the manifest."""


def read_source(config: SourceConfig, max_checkpoints: int) -> Source:
    """Finds checkpoints and prompts; a run's manifest knows both.

    Raises UsageError for what is not there, DataError for a dataset that has changed since.
    """
    directory = directory_of(config)
    if config.run is not None:
        return _from_run(directory, config.prompts, max_checkpoints)
    checkpoints = find_checkpoints(directory)[-max_checkpoints:]
    if not (checkpoints[0] / CONFIG_FILE).is_file():
        return _from_run(directory, config.prompts, max_checkpoints)
    if config.prompts is None:
        raise UsageError(f"{directory}: PEFT adapters do not know their prompts; add prompts: FILE")
    adapter = read_adapter(checkpoints[0])
    base = str(adapter.config.get("base_model_name_or_path"))
    prompts = read_prompts(parsed_source(config.prompts))
    return Source(directory.name, checkpoints, prompts, adapter.config, base)


def _from_run(path: Path, prompts: str | None, max_checkpoints: int) -> Source:
    run = run_directory_of(path)
    manifest = read_manifest(run, LoraManifest)
    checkpoints = find_checkpoints(run)[-max_checkpoints:]
    if prompts is None and not manifest.dataset.path:
        raise UsageError(
            f"{run}: it was converted without its dataset's file; give the prompts in the YAML, "
            "sources: [{run: ..., prompts: FILE}], or remove it and convert again with --dataset"
        )
    file = parsed_source(prompts or manifest.dataset.path)
    if prompts is None and isinstance(file, Path) and not file.is_file():
        raise UsageError(f"{run}: its dataset {file} is gone; name one with prompts: FILE")
    if prompts is None and content_hash(file) != manifest.dataset.sha256:
        raise DataError(
            f"{run}: its dataset {file} has changed since the run; name one with prompts: FILE"
        )
    own = prompts is None  # whose bad rows the run has left out
    return Source(
        manifest.dataset.name,
        checkpoints,
        prompts_of_rows(file, skip_bad_rows=True) if own else read_prompts(file),
        manifest.adapter_config,
        manifest.base_model,
    )


def common_layout(sources: Sequence[Source], config: GenTrainConfig) -> Layout:
    """The layout of all sources. Raises DataError naming a source whose adapters differ."""
    layout = Layout.of(
        read_tensors(sources[0].checkpoints[-1]), config.layout.token_dim, config.layout.max_seq_len
    )
    for source in sources:
        first = source.checkpoints[-1]
        try:
            layout.check(read_tensors(first))
        except DataError as error:
            raise DataError(f"{first}: not the adapter of {sources[0].name}: {error}") from None
    return layout


@contextmanager
def prepared(
    sources: Sequence[Source],
    layout: Layout,
    encoder: Encoder,
    encoder_key: str,
    config: GenTrainConfig,
) -> Iterator[list[PreparedSource]]:
    """Tokenised checkpoints and embedded prompts, from the cache where they are there already."""
    with _cache(config.data) as cache:
        ready = []
        for source in sources:
            texts = grouped(source.prompts, config.data.samples_per_prompt, config.seed)
            embeddings, mask = _embedded(cache, encoder, encoder_key, texts)
            key = _tokens_key(layout, source)
            tokens = _tokenized(cache, key, layout, source)
            record = SourceRecord(name=source.name, checkpoints=key, prompts=sha256_text(*texts))
            ready.append(PreparedSource(source.name, tokens, embeddings, mask, record))
        yield ready


@contextmanager
def _cache(data: GenData) -> Iterator[Path]:
    if data.cache_tokenized:
        yield Path(data.cache_dir)
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        yield Path(directory)


def _tokens_key(layout: Layout, source: Source) -> str:
    hashes = [sha256(_weights(file)) for file in source.checkpoints]
    return sha256_text(repr(layout.state()), *hashes)[:32]


def _tokenized(cache: Path, key: str, layout: Layout, source: Source) -> np.ndarray:
    file = cache / "tokens" / f"{key}.npy"
    if not file.is_file():
        shape = (len(source.checkpoints), layout.tokens, layout.token_dim)
        with written_atomically(file) as temporary:
            array = np.lib.format.open_memmap(temporary, "w+", np.float32, shape)
            for row, checkpoint in enumerate(source.checkpoints):
                try:
                    array[row] = layout.pack(read_tensors(checkpoint)).float().numpy()
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
    stem = cache / "embeddings" / sha256_text(key, *texts)[:32]
    files = [stem.with_suffix(".npy"), stem.with_suffix(".mask.npy")]
    if not all(file.is_file() for file in files):
        with torch.inference_mode():
            embeddings, mask = encoder(texts)
        for file, tensor in zip(files, (embeddings.float(), mask), strict=True):
            with written_atomically(file) as temporary:
                np.save(temporary, tensor.cpu().numpy())
    return np.load(files[0], mmap_mode="r"), np.load(files[1], mmap_mode="r")
