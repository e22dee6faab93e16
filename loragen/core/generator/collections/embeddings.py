"""Texts -> embeddings as arrays on disk: memory holds those of some texts, never of a dataset."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

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
