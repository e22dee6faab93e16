"""Embedded texts: written to disk piece by piece, and compared with the training datasets.

`Familiarity` computes an out-of-distribution score of prompts. A dataset's centre is the mean of
its embedded texts, and training stores the centres of all datasets. The score of new prompts is the
distance of their mean to the nearest centre, with two corrections that make it comparable between 1
prompt and 1,000, and between 2 datasets and 50:

- The mean of n texts deviates from its expectation by the variance of the texts over n, which is
  subtracted: ``d² = |mean - centre|² - variance / n - variance_centre / n_centre``.
- The unit is the reach of the training: the largest distance from a training dataset to its
  nearest neighbour, since the generator has learned to distinguish datasets that far apart; but at
  least 0.6 of the typical distance of one text to its centre, since a few datasets may lie very
  close, and a single one has no neighbour.

Only means are compared: prompts of very mixed subjects have their mean near the middle of all
datasets and look closer than they are. No covariance is estimated: 2 to 50 centres in some hundred
dimensions are too few for one.
"""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from loragen.core.files import UNFINISHED, reserve, write_errors, written_atomically
from loragen.core.protocols import Encoder

TEXTS_AT_ONCE = 1024
"""Texts in memory at a time: with one embedding per token, a text has some hundred KiB."""
FAR = 1.1
"""The out-of-distribution threshold of the score. With all-MiniLM-L6-v2, trained on five of six
commonsense datasets, prompts of the sixth had 0.1 to 1.05; trained on all six, Chinese poems, code,
SQL, translation and sums had 1.25 to 1.7, film reviews 0.95 to 1.35."""
MIN_REACH = 0.6
"""The smallest reach, in units of the typical distance of a text to its dataset's centre."""


@torch.no_grad()
def write_embeddings(
    encoder: Encoder,
    texts: Sequence[str],
    embeddings: Path,
    mask: Path,
    device: torch.device | None = None,
) -> None:
    """Writes two .npy files: ``[texts, positions, dim]`` float32 and ``[texts, positions]`` bool.

    The encoder computes on `device`, if that is given, and is back on the CPU afterwards. The
    number of positions is that of the longest text, which is known only at the end: until then the
    pieces are stored beside the files, each with its own width.
    """
    embeddings.parent.mkdir(parents=True, exist_ok=True)
    parts = tempfile.TemporaryDirectory(UNFINISHED, f".{embeddings.name}.", embeddings.parent)
    with _computing_on(device, encoder), parts as folder, write_errors(embeddings):
        pieces: dict[str, list[Path]] = {"embeddings": [], "mask": []}
        for first in range(0, len(texts), TEXTS_AT_ONCE):
            # Float32 instead of half precision: conditions have to be the same in training and in
            # inference. The arrays are memory-mapped, so their size costs no memory.
            vectors, valid = encoder(texts[first : first + TEXTS_AT_ONCE])
            for kind, tensor in (("embeddings", vectors.float()), ("mask", valid)):
                pieces[kind].append(Path(folder) / f"{kind}-{first}.npy")
                np.save(pieces[kind][-1], tensor.cpu().numpy())
        _concatenate(pieces["embeddings"], embeddings)
        _concatenate(pieces["mask"], mask)


@contextmanager
def _computing_on(device: torch.device | None, encoder: Any) -> Iterator[None]:
    """Moves the encoder to the device for the block, and back to the CPU afterwards."""
    if device is None or not isinstance(encoder, nn.Module):
        yield
        return
    encoder.to(device)
    try:
        yield
    finally:
        encoder.to("cpu")


def _concatenate(pieces: Sequence[Path], file: Path) -> None:
    """Writes the pieces below each other, padded with zeros to the widest."""
    shapes = [np.load(piece, mmap_mode="r").shape for piece in pieces]
    rows, positions = sum(shape[0] for shape in shapes), max(shape[1] for shape in shapes)
    with written_atomically(file) as temporary:
        dtype = np.load(pieces[0], mmap_mode="r").dtype
        array = np.lib.format.open_memmap(temporary, "w+", dtype, (rows, positions, *shapes[0][2:]))
        reserve(temporary)
        row = 0
        for piece, shape in zip(pieces, shapes, strict=True):
            array[row : row + shape[0], : shape[1]] = np.load(piece)
            row += shape[0]
        array.flush()
        del array


def chunks(embeddings: np.ndarray, mask: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the arrays in pieces of `TEXTS_AT_ONCE` texts, read into memory."""
    for first in range(0, len(embeddings), TEXTS_AT_ONCE):
        part = slice(first, first + TEXTS_AT_ONCE)
        yield np.array(embeddings[part]), np.array(mask[part])


@dataclass(frozen=True)
class Distance:
    """The out-of-distribution score of some prompts, in units of the reach of the training."""

    nearest: str
    """The training dataset with the nearest centre."""
    ratio: float
    """The score: the distance to that centre. Below 1 is in distribution."""
    error: float
    """The standard error of the prompts' mean."""

    @property
    def far(self) -> bool:
        """Whether the prompts are out of distribution."""
        return self.ratio > FAR

    @property
    def vague(self) -> bool:
        """Whether the standard error is as large as the distance between datasets."""
        return self.error > 1


@dataclass(frozen=True)
class Familiarity:
    """An out-of-distribution score: the centres of the training datasets, and their reach.

    It is stored in a generator's file under its field names.
    """

    datasets: list[str]
    centres: Tensor
    """``[datasets, dim]`` float32"""
    noise: Tensor
    """``[datasets]`` float32: the variance of each centre, summed over the dimensions."""
    text_variance: float
    """Mean squared distance of a text to its dataset's centre."""
    reach: float
    """The unit of the score: how far apart the training datasets are."""

    @classmethod
    def fit(cls, datasets: Iterable[tuple[str, np.ndarray, np.ndarray]]) -> "Familiarity | None":
        """Fits (name, embeddings ``[texts, positions, dim]``, mask ``[texts, positions]``) of every
        dataset, piece by piece. Returns None for a single text, which has no scale."""
        names, centres, variances, counts = [], [], [], []
        for name, embeddings, mask in datasets:
            pieces = (map(torch.from_numpy, arrays) for arrays in chunks(embeddings, mask))
            texts = torch.cat([text_vectors(*piece) for piece in pieces])
            names.append(name)
            centres.append(texts.mean(0))
            variances.append(_variance(texts))
            counts.append(len(texts))
        several = [v for v, count in zip(variances, counts, strict=True) if count > 1]
        typical = sum(several) / len(several) if several else 0.0
        noise = torch.tensor(
            [(v if n > 1 else typical) / n for v, n in zip(variances, counts, strict=True)]
        )
        stacked = torch.stack(centres)
        reach = MIN_REACH * typical**0.5
        if len(centres) > 1:
            squares = torch.cdist(stacked, stacked).square() - noise - noise[:, None]
            squares.fill_diagonal_(float("inf"))
            reach = max(float(squares.min(1).values.max().clamp(min=0).sqrt()), reach)
        return cls(names, stacked, noise, typical, reach) if reach > 0 else None

    def distance(self, condition: Tensor, mask: Tensor) -> Distance:
        """Returns the score of embedded prompts ``[texts, positions, dim]`` with their mask."""
        texts = text_vectors(condition, mask)
        variance = _variance(texts) if len(texts) > 1 else self.text_variance
        squares = (self.centres - texts.mean(0)).square().sum(1) - self.noise
        squares -= variance / len(texts)
        nearest = int(squares.argmin())
        ratio = float(squares[nearest].clamp(min=0).sqrt()) / self.reach
        error = (self.text_variance / len(texts)) ** 0.5 / self.reach
        return Distance(self.datasets[nearest], round(ratio, 3), round(error, 3))


@torch.no_grad()
def mean_embedding(
    encoder: Encoder, texts: Sequence[str], device: torch.device | None = None
) -> Tensor:
    """Returns the centre of the texts, ``[dim]`` float32. The encoder computes on `device`, if that
    is given, and is back on the CPU afterwards."""
    total = torch.zeros(encoder.dim, dtype=torch.float64)
    with _computing_on(device, encoder):
        for first in range(0, len(texts), TEXTS_AT_ONCE):
            embeddings, mask = encoder(texts[first : first + TEXTS_AT_ONCE])
            total += text_vectors(embeddings, mask).cpu().double().sum(0)
    return (total / len(texts)).float()


def text_vectors(embeddings: Tensor, mask: Tensor) -> Tensor:
    """Returns ``[texts, dim]``: the mean over the valid positions of each text."""
    kept = mask.unsqueeze(-1)
    total = torch.where(kept, embeddings.float(), 0.0).sum(1)
    return total / kept.sum(1).clamp(min=1)


def _variance(texts: Tensor) -> float:
    """Returns the unbiased estimate of the mean squared distance to the mean; 0 for one text."""
    squares = (texts - texts.mean(0)).square().sum()
    return float(squares) / max(len(texts) - 1, 1)
