"""The collected adapters that a decoder combines: memory-mapped, and stored beside a generator.

The file holds one float32 tensor, `adapters` ``[N, tokens, token_dim]``, as safetensors. It is
written and read piece by piece, so that it may be larger than the memory.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loragen.core.errors import DataError
from loragen.core.files import written_atomically

SAMPLED = 64  # values of every adapter that enter the fingerprint
CHUNK = 2**22  # values of one adapter at a time: 16 MiB


class Collected:
    """One adapter of each training dataset (see `loragen.core.protocols.CollectedAdapters`)."""

    def __init__(self, adapters: Sequence[np.ndarray], scale: Tensor) -> None:
        """`adapters` are ``[tokens, token_dim]`` float32, in their own units; `scale` ``[tokens,
        1]`` is that of the generator's `Normalization`."""
        self.adapters, self.scale = adapters, scale

    def __deepcopy__(self, memo: Any) -> "Collected":
        return self  # a copy of a network, for averaging, reads the same files

    @property
    def shape(self) -> tuple[int, int, int]:
        tokens, dim = self.adapters[0].shape
        return len(self.adapters), tokens, dim

    def read(self, datasets: Sequence[int], tokens: slice) -> Tensor:
        stacked = np.stack([self.adapters[index][tokens] for index in datasets])
        return torch.from_numpy(stacked).div_(self.scale[tokens])

    def mean(self) -> Tensor:
        """Returns the mean adapter in its own units, ``[tokens, token_dim]``."""
        total = np.zeros(self.adapters[0].shape)
        for adapter in self.adapters:
            total += adapter
        return torch.from_numpy(total / len(self.adapters)).float()

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the shape and of an even sample of every adapter's values."""
        hashed = sha256(repr(self.shape).encode())
        for adapter in self.adapters:
            flat = adapter.reshape(-1)
            hashed.update(np.ascontiguousarray(flat[:: -(-flat.size // SAMPLED)]).tobytes())
        return hashed.hexdigest()

    def save(self, file: Path) -> None:
        """Writes the file, unless it is there with the same adapters."""
        if file.is_file() and _fingerprint_in(file) == self.fingerprint:
            return
        count, tokens, dim = self.shape
        header = {
            "__metadata__": {"format": "pt", "fingerprint": self.fingerprint},
            "adapters": {
                "dtype": "F32",
                "shape": self.shape,
                "data_offsets": (0, 4 * count * tokens * dim),
            },
        }
        # `safetensors.torch.save_file` would need the whole tensor in memory.
        described = json.dumps(header).encode()
        described += b" " * (-len(described) % 8)
        step = max(1, CHUNK // dim)
        with written_atomically(file) as temporary, temporary.open("wb") as stream:
            stream.write(len(described).to_bytes(8, "little") + described)
            for adapter in self.adapters:
                for first in range(0, tokens, step):
                    piece = adapter[first : first + step]
                    stream.write(np.ascontiguousarray(piece, "<f4").tobytes())

    @classmethod
    def load(cls, file: Path, scale: Tensor, fingerprint: str) -> "Collected":
        """Maps a file into memory. Raises DataError if it is missing, or not the file with this
        fingerprint, which the generator's file states."""
        if not file.is_file():
            raise DataError(
                f"its collected adapters are missing: no {file.name} beside it; copy both files"
            )
        if _fingerprint_in(file) != fingerprint:
            raise DataError(f"{file.name} has the adapters of another generator; copy both files")
        with safe_open(file, "pt") as stored:
            adapters = stored.get_tensor("adapters").numpy()  # not read before it is used
        return cls(list(adapters), scale)


def _fingerprint_in(file: Path) -> str:
    """Returns the fingerprint that a file states. Raises DataError for a damaged file."""
    try:
        with safe_open(file, "pt") as stored:
            return str((stored.metadata() or {}).get("fingerprint", ""))
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file.name}: not a file of collected adapters: {error}") from error
