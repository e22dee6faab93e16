"""Texts -> conditions, where the encoder is trained along and nothing is embedded before."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from loragen.core.generator.collections.embeddings import write_embeddings
from loragen.core.generator.collections.prepared import PreparedSource
from loragen.core.protocols import Encoder


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
    encoder: Encoder, sources: Sequence[PreparedSource]
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
