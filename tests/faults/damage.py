"""Damaged copies of valid files, for the tests of whatever reads files."""

from pathlib import Path


def cut(file: Path, share: float = 0.5) -> Path:
    """Cuts a file to a share of its bytes, as a full disk or a broken transfer does."""
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    return file


def flip(file: Path, at: float = 0.5) -> Path:
    """Flips one bit of the byte that lies at a share of a file, as a failing disk does."""
    content = bytearray(file.read_bytes())
    content[int((len(content) - 1) * at)] ^= 0x10
    file.write_bytes(content)
    return file
