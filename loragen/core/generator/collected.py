"""The collected adapters that a decoder combines: memory-mapped, and stored beside a generator.

The file holds one float32 tensor, `adapters` ``[N, tokens, token_dim]``, as safetensors. It is
written and read piece by piece, so that it may be larger than the memory.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loragen.core.errors import DataError
from loragen.core.files import written_atomically

SAMPLED = 64  # values of every adapter that enter the fingerprint
CHECKSUMS = "crc32"
CHUNK = 2**22  # values of one adapter at a time: 16 MiB


class Collected:
    """One adapter of each training dataset (see `loragen.core.protocols.CollectedAdapters`)."""

    def __init__(self, adapters: Sequence[np.ndarray], scale: Tensor) -> None:
        """`adapters` are ``[tokens, token_dim]`` float32, in their own units; `scale` ``[tokens,
        1]`` is that of the generator's `Normalization`."""
        self.adapters, self.scale = adapters, scale
        self.file: Path | None = None
        self.unchecked: dict[int, str] = {}
        """The checksums of the adapters of `file` that have not been read yet."""
        self._saved: tuple[Path, int, int] | None = None
        """The file that was written or checked last, with its size and its time of change."""

    def __deepcopy__(self, memo: Any) -> "Collected":
        return self  # a copy of a network, for averaging, reads the same files

    @property
    def shape(self) -> tuple[int, int, int]:
        tokens, dim = self.adapters[0].shape
        return len(self.adapters), tokens, dim

    def read(self, datasets: Sequence[int], tokens: slice) -> Tensor:
        for index in {*datasets} & self.unchecked.keys():
            self.check(index)
        stacked = np.stack([self.adapters[index][tokens] for index in datasets])
        return torch.from_numpy(stacked).div_(self.scale[tokens])

    def mean(self) -> Tensor:
        """Returns the mean adapter in its own units, ``[tokens, token_dim]``."""
        total = np.zeros(self.adapters[0].shape)
        for index, adapter in enumerate(self.adapters):
            self.check(index)
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
        """Writes the file, unless it is there with the same adapters, undamaged. Every checkpoint
        of a training saves it, so it is read only if it has changed since the last time."""
        if file.is_file() and self._saved == _state(file):
            return
        with suppress(DataError):
            if file.is_file() and _metadata(file).get("fingerprint") == self.fingerprint:
                known = Collected.load(file, self.scale, self.fingerprint)
                for index in range(len(known.adapters)):
                    known.check(index)
                self._saved = _state(file)
                return
        count, tokens, dim = self.shape
        metadata = {"format": "pt", "fingerprint": self.fingerprint}
        adapters = {
            "dtype": "F32",
            "shape": self.shape,
            "data_offsets": (0, 4 * count * tokens * dim),
        }
        checksums = ["0" * 8] * count  # each has the same width, so that they can be written last

        def header() -> bytes:
            described = {**metadata, CHECKSUMS: " ".join(checksums)}
            text = json.dumps({"__metadata__": described, "adapters": adapters}).encode()
            return text + b" " * (-len(text) % 8)

        # `safetensors.torch.save_file` would need the whole tensor in memory.
        with written_atomically(file) as temporary, temporary.open("wb") as stream:
            stream.write(len(header()).to_bytes(8, "little") + header())
            for index, adapter in enumerate(self.adapters):
                checksum = 0
                for piece in _pieces(adapter):
                    stream.write(piece)
                    checksum = crc32(piece, checksum)
                checksums[index] = f"{checksum:08x}"
            stream.seek(8)
            stream.write(header())
        self._saved = _state(file)

    @classmethod
    def load(cls, file: Path, scale: Tensor, fingerprint: str) -> "Collected":
        """Maps a file into memory. Raises DataError if it is missing, or not the file with this
        fingerprint, which the generator's file states."""
        if not file.is_file():
            raise DataError(
                f"its collected adapters are missing: no {file.name} beside it; copy both files"
            )
        metadata = _metadata(file)
        if metadata.get("fingerprint") != fingerprint:
            raise DataError(f"{file.name} has the adapters of another generator; copy both files")
        with safe_open(file, "pt") as stored:
            adapters = stored.get_tensor("adapters").numpy()  # not read before it is used
        found = cls(list(adapters), scale)
        found.file, found.unchecked = file, dict(enumerate(metadata.get(CHECKSUMS, "").split()))
        return found

    def check(self, index: int) -> None:
        """Reads an adapter of a file and compares its checksum, once. Raises DataError if it is not
        what was written."""
        if expected := self.unchecked.get(index):
            checksum = 0
            for piece in _pieces(self.adapters[index]):
                checksum = crc32(piece, checksum)
            if f"{checksum:08x}" != expected:
                raise DataError(
                    f"{self.file}: damaged: adapter {index + 1} of {len(self.adapters)} is not "
                    "what was written (checksum); restore it, or train the generator again"
                )
            del self.unchecked[index]


def _state(file: Path) -> tuple[Path, int, int]:
    found = file.stat()
    return file, found.st_size, found.st_mtime_ns


def _pieces(adapter: np.ndarray) -> Iterator[bytes]:
    """Yields the bytes of an adapter as they are in the file, 16 MiB at a time."""
    step = max(1, CHUNK // adapter.shape[1])
    for first in range(0, len(adapter), step):
        yield np.ascontiguousarray(adapter[first : first + step], "<f4").tobytes()


def _metadata(file: Path) -> dict[str, str]:
    """Returns the metadata of a file. Raises DataError for a damaged file."""
    try:
        with safe_open(file, "pt") as stored:
            return dict(stored.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"{file.name}: not a file of collected adapters, or damaged: {error}"
        ) from error
