"""Texts -> embeddings as arrays on disk: memory holds those of some texts, never of a dataset.

How far prompts are from what a generator was trained on.

A dataset's condition is the mean of its embedded texts; training leaves the centre of each dataset
behind. New prompts are as far away as their mean is from the nearest centre. Two corrections make
that distance mean the same for 1 prompt and for 1,000, and for 2 datasets and for 50:

- The mean of n texts strays from its expectation by the texts' variance over n, which is taken off:
  ``d² = |mean - centre|² - variance / n - variance_centre / n_centre``.
- It is told in units of the *reach* of the training: the largest distance of a training dataset to
  the nearest other one, since a generator that was told apart such datasets may be asked to go as
  far again; but no less than 0.6 of the typical distance of a single text to its centre, since a
  few datasets may lie very close, and a single one has no neighbour.

Only means are compared: prompts of very mixed subjects have their mean near the middle of
everything, and look nearer than they are. No covariance is estimated: 2 to 50 centres in some
hundred dimensions would not carry one.
"""

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loragen.core.files import written_atomically
from loragen.core.protocols import Encoder

TEXTS_AT_ONCE = 1024
"""With an embedding a token, some hundred KiB a text."""


@torch.no_grad()
def write_embeddings(encoder: Encoder, texts: Sequence[str], embeddings: Path, mask: Path) -> None:
    """Two .npy files: ``[texts, positions, dim]`` float32 and ``[texts, positions]`` bool.

    How many positions the longest text has is known at the end: until then parts of different
    width lie beside the files.
    """
    embeddings.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=embeddings.parent, prefix=".parts.") as folder:
        parts = []
        for first in range(0, len(texts), TEXTS_AT_ONCE):
            found = encoder(texts[first : first + TEXTS_AT_ONCE])
            part = [Path(folder) / f"{kind}-{first}.npy" for kind in ("embeddings", "mask")]
            # In float32, although half would do for disks: a generator is to read in training what
            # it reads later. Memory-mapped, the size costs no memory.
            np.save(part[0], found[0].float().cpu().numpy())
            np.save(part[1], found[1].cpu().numpy())
            parts.append(part)
        for file, kind in zip((embeddings, mask), zip(*parts, strict=True), strict=True):
            _join(kind, file)


def _join(parts: Sequence[Path], file: Path) -> None:
    """One below the other, padded with zeros to the widest."""
    shapes = [np.load(part, mmap_mode="r").shape for part in parts]
    rows, positions = sum(shape[0] for shape in shapes), max(shape[1] for shape in shapes)
    with written_atomically(file) as temporary:
        dtype = np.load(parts[0], mmap_mode="r").dtype
        array = np.lib.format.open_memmap(temporary, "w+", dtype, (rows, positions, *shapes[0][2:]))
        at = 0
        for part, shape in zip(parts, shapes, strict=True):
            array[at : at + shape[0], : shape[1]] = np.load(part)
            at += shape[0]
        array.flush()
        del array


FAR = 1.1
"""In units of the reach. With all-MiniLM-L6-v2, trained on five of six commonsense datasets,
prompts of the sixth were at 0.1 to 1.05; trained on six, Chinese poems, code, SQL, translation and
sums at 1.25 to 1.7, film reviews at 0.95 to 1.35."""
LEAST_REACH = 0.6
"""In units of the typical distance of a text to its dataset's centre."""


@dataclass(frozen=True)
class Distance:
    """Of some prompts to the training."""

    nearest: str
    """The training dataset with the nearest centre."""
    ratio: float
    """0 at its centre, 1 at the reach of the training."""
    error: float
    """How far the mean of so few texts strays by chance, in the same unit."""

    @property
    def far(self) -> bool:
        return self.ratio > FAR

    @property
    def vague(self) -> bool:
        """Whether chance alone moves the condition as far as from one dataset to the next."""
        return self.error > 1


@dataclass(frozen=True)
class Familiarity:
    """The centres of the training datasets, and how far they reach."""

    datasets: list[str]
    centres: Tensor
    """``[datasets, dim]`` float32"""
    noise: Tensor
    """``[datasets]`` float32: the variance of each centre, over all dimensions together."""
    text_variance: float
    """Mean squared distance of a text to its dataset's centre."""
    reach: float

    @classmethod
    def fit(cls, datasets: Iterable[tuple[str, np.ndarray, np.ndarray]]) -> "Familiarity | None":
        """Of (name, embeddings ``[texts, positions, dim]``, mask ``[texts, positions]``), some
        texts in memory at a time. None where a single text was seen: there is no measure."""
        names, centres, variances, counts = [], [], [], []
        for name, embeddings, mask in datasets:
            texts = _text_vectors(embeddings, mask)
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
        reach = max(_largest_gap(stacked, noise), LEAST_REACH * typical**0.5)
        return cls(names, stacked, noise, typical, reach) if reach > 0 else None

    def distance(self, condition: Tensor, mask: Tensor) -> Distance:
        """Of embedded prompts, ``[texts, positions, dim]`` and their mask."""
        texts = text_vectors(condition, mask)
        variance = _variance(texts) if len(texts) > 1 else self.text_variance
        squares = (self.centres - texts.mean(0)).square().sum(1) - self.noise
        squares -= variance / len(texts)
        nearest = int(squares.argmin())
        apart = float(squares[nearest].clamp(min=0).sqrt()) / self.reach
        error = (self.text_variance / len(texts)) ** 0.5 / self.reach
        return Distance(self.datasets[nearest], round(apart, 3), round(error, 3))

    def state(self) -> dict[str, Any]:
        """Plain data and tensors, for a generator's file."""
        return dict(vars(self))


def text_vectors(embeddings: Tensor, mask: Tensor) -> Tensor:
    """``[texts, dim]``: the mean over the positions of each text."""
    kept = mask.unsqueeze(-1)
    total = torch.where(kept, embeddings.float(), 0.0).sum(1)
    return total / kept.sum(1).clamp(min=1)


def _text_vectors(embeddings: np.ndarray, mask: np.ndarray) -> Tensor:
    """`text_vectors` of memory-mapped arrays, some texts after the other."""

    def some(first: int) -> Tensor:
        part = slice(first, first + TEXTS_AT_ONCE)
        arrays = (torch.from_numpy(np.array(array[part])) for array in (embeddings, mask))
        return text_vectors(*arrays)

    return torch.cat([some(first) for first in range(0, len(embeddings), TEXTS_AT_ONCE)])


def _variance(texts: Tensor) -> float:
    """Mean squared distance to the expectation, estimated without bias; 0 for a single text."""
    squares = (texts - texts.mean(0)).square().sum()
    return float(squares) / max(len(texts) - 1, 1)


def _largest_gap(centres: Tensor, noise: Tensor) -> float:
    """The largest distance of a centre to the nearest other one; 0 where there is only one."""
    if len(centres) < 2:
        return 0.0
    squares = torch.cdist(centres, centres).square() - noise - noise[:, None]
    squares.fill_diagonal_(float("inf"))
    return float(squares.min(1).values.max().clamp(min=0).sqrt())
