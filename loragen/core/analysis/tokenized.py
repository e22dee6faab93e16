"""One adapter as a generator's tokens: layout, share of padding, and a check of the round trip."""

import logging
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from loragen.core.adapter.checks import check_ba, not_finite
from loragen.core.adapter.layout import NO_LAYER, Layout, TensorSpec
from loragen.core.errors import listing
from loragen.core.run.checkpoints import load_adapter
from loragen.core.run.directory import find_checkpoints

log = logging.getLogger(__name__)

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""{bytes of a value: integers that compare bit for bit}: NaN equals NaN, and 0 differs from -0."""


@dataclass(frozen=True)
class TensorKind:
    """The tensors of one kind of module, over all layers."""

    module: str
    matrix: str
    tensors: int
    layers: int
    """0 if the modules are in no layer."""
    shape: list[int]
    dtype: str
    tokens_each: int


@dataclass(frozen=True)
class Tokenized:
    """One adapter as tokens, and the differences after packing and unpacking."""

    file: str
    token_dim: int
    tokens: int
    max_tokens: int | Literal["auto"]
    fits: bool
    tensors: int
    values: int
    fill: float
    """Share of the grid that holds values; the rest is padding."""
    bits_changed: int
    """Values that differ, bit for bit, after packing and unpacking."""
    largest_error: float
    """The largest difference between finite values."""
    kinds: list[TensorKind]


def tokenized(path: Path, token_dim: int, max_tokens: int | Literal["auto"]) -> Tokenized:
    """Tokenises a .ckpt, .pt, .safetensors or PEFT directory, or the newest checkpoint of a folder.

    Raises UsageError if there is none, DataError for a file without LoRA tensors, or with others.
    """
    file = find_checkpoints(path)[-1]
    read = load_adapter(file)
    check_ba(read.config, read.tensors, file)
    adapter = read.tensors
    if bad := not_finite(adapter):
        log.warning("%s: NaN or infinity in %s", file, listing(bad, 2))
    layout = Layout.of(adapter, token_dim)
    back = layout.unpack(layout.pack(adapter))
    return Tokenized(
        file=str(file),
        token_dim=token_dim,
        tokens=layout.tokens,
        max_tokens=max_tokens,
        fits=max_tokens == "auto" or layout.tokens <= max_tokens,
        tensors=len(layout.tensors),
        values=layout.values,
        fill=layout.values / (layout.tokens * token_dim),
        bits_changed=sum(bits_changed(t, back[key]) for key, t in adapter.items()),
        largest_error=max(largest_error(t, back[key]) for key, t in adapter.items()),
        kinds=_kinds(layout),
    )


def bits_changed(one: Tensor, other: Tensor) -> int:
    """Returns how many values of two tensors of one shape and dtype differ in any bit."""
    integers = BITS[one.element_size()]
    pair = (tensor.contiguous().view(integers) for tensor in (one, other))
    return int(torch.ne(*pair).sum())


def largest_error(one: Tensor, other: Tensor) -> float:
    """Returns the largest difference between finite values of two tensors."""
    difference = (one.double() - other.double()).abs()
    finite = difference[torch.isfinite(difference)]
    return float(finite.max()) if len(finite) else 0.0


def _kinds(layout: Layout) -> list[TensorKind]:
    """Returns one entry for tensors that differ only in their layer, in the order of modules."""

    def kind_of(spec: TensorSpec) -> tuple[Any, ...]:
        return spec.module, spec.matrix, spec.shape, str(spec.dtype)

    tokens = dict(zip(layout.tensors, layout.counts, strict=True))
    kinds = []
    for _, group in groupby(sorted(layout.tensors, key=kind_of), key=kind_of):
        specs = list(group)
        first = specs[0]
        kinds.append(
            TensorKind(
                module=first.module,
                matrix=first.matrix,
                tensors=len(specs),
                layers=len({spec.layer for spec in specs} - {NO_LAYER}),
                shape=list(first.shape),
                dtype=str(first.dtype).removeprefix("torch."),
                tokens_each=tokens[first],
            )
        )
    return kinds
