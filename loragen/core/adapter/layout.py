"""The layout: the tensors of any LoRA adapter <-> a grid of tokens, derived from the tensors.

A token of an adapter is a chunk of `token_dim` of its values; it has nothing to do with the tokens
of a text. Every matrix is cut into tokens rank component by rank component: lora_A ``[r, in]`` row
by row, lora_B ``[out, r]`` column by column, so that neighbouring values of a token belong to one
rank-1 component. The last token of a matrix is padded with zeros, which the mask excludes. Packing
and unpacking only move values, so they are exact, bit for bit.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from loragen.core.adapter import KEY_PREFIX
from loragen.core.adapter.checks import not_ba
from loragen.core.adapter.files import shape_mismatch
from loragen.core.errors import DataError, UsageError
from loragen.core.files import natural_key
from loragen.core.protocols import TokenGrid

NO_LAYER = -1
PACKING_VERSION = 1
"""Part of the keys of caches: a change of how `Layout.pack` arranges values raises it."""


@dataclass(frozen=True)
class TensorSpec:
    """The key (PEFT's file key), shape and dtype of one tensor of an adapter."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def layer(self) -> int:
        """The index of the transformer layer: the number in the key, -1 if it has none."""
        number = re.search(r"\.(\d+)\.", self.key)
        return int(number.group(1)) if number else NO_LAYER

    @property
    def module(self) -> str:
        """The module's path below its layer, `self_attn.q_proj`."""
        path = re.sub(r"\.lora_.*|\.weight$", "", self.key)
        return re.split(r"\.\d+\.", path)[-1]

    @property
    def path(self) -> str:
        """The module's path in the base model."""
        return re.split(r"\.lora_", self.key.removeprefix(KEY_PREFIX))[0]

    @property
    def matrix(self) -> str:
        """The kind of tensor, in PEFT's words: `lora_A`, `lora_B`, `lora_embedding_A`."""
        kind = re.search(r"\.(lora_\w+)", self.key)
        return kind.group(1) if kind else "weight"

    @property
    def by_columns(self) -> bool:
        """Whether the tensor is cut column by column."""
        return self.matrix == "lora_B" and len(self.shape) == 2


@dataclass(frozen=True)
class Layout:
    """The position of every value of an adapter in the grid ``[tokens, token_dim]``."""

    tensors: tuple[TensorSpec, ...]
    token_dim: int

    @classmethod
    def of(
        cls,
        adapter: Mapping[str, Tensor],
        token_dim: int,
        max_tokens: int | Literal["auto"] = "auto",
    ) -> "Layout":
        """Derives the layout of an adapter; the order of its tensors does not matter.

        Raises DataError for a tensor that is not of floating point or no factor of ΔW = BA, and
        UsageError naming the number needed if the adapter has more than `max_tokens` tokens.
        """
        if reason := not_ba({}, adapter):
            raise DataError(reason)
        specs = [TensorSpec(key, tuple(t.shape), t.dtype) for key, t in adapter.items()]
        for spec in specs:
            if not spec.dtype.is_floating_point:
                raise DataError(f"{spec.key}: {spec.dtype} is not a floating-point dtype")
        layout = cls(tuple(sorted(specs, key=lambda spec: natural_key(spec.key))), token_dim)
        if max_tokens != "auto" and layout.tokens > max_tokens:
            raise UsageError(
                f"layout.max_seq_len is {max_tokens}, but the adapter needs {layout.tokens} tokens "
                f"of {token_dim} values; set it to {layout.tokens} or auto"
            )
        return layout

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """The number of tokens of each tensor."""
        return tuple(-(-spec.size // self.token_dim) for spec in self.tensors)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The index of the first token of each tensor."""
        return tuple(accumulate(self.counts, initial=0))[:-1]

    @property
    def tokens(self) -> int:
        """The number of tokens of the whole adapter."""
        return sum(self.counts)

    @property
    def values(self) -> int:
        """The number of values of the adapter, without padding."""
        return sum(spec.size for spec in self.tensors)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The narrowest dtype that holds every tensor exactly."""
        dtype = self.tensors[0].dtype if self.tensors else torch.float32
        for spec in self.tensors:
            dtype = torch.promote_types(dtype, spec.dtype)
        return dtype

    def pack(self, adapter: Mapping[str, Tensor]) -> Tensor:
        """Returns the adapter as ``[tokens, token_dim]``. Raises DataError as `check` does."""
        self.check(adapter)
        flat = torch.zeros(self.tokens * self.token_dim, dtype=self.dtype)
        for spec, start in zip(self.tensors, self.starts, strict=True):
            tensor = adapter[spec.key]
            values = (tensor.T if spec.by_columns else tensor).reshape(-1)
            flat[start * self.token_dim :][: spec.size] = values
        return flat.view(self.tokens, self.token_dim)

    def unpack(self, tokens: Tensor) -> dict[str, Tensor]:
        """Returns the adapter of ``[tokens, token_dim]``, each tensor in its shape and dtype."""
        if tuple(tokens.shape) != (self.tokens, self.token_dim):
            raise DataError(
                f"tokens of shape {list(tokens.shape)}, expected {[self.tokens, self.token_dim]}"
            )
        flat = tokens.reshape(-1)
        adapter = {}
        for spec, start in zip(self.tensors, self.starts, strict=True):
            values = flat[start * self.token_dim :][: spec.size]
            shaped = values.view(spec.shape[::-1]).T if spec.by_columns else values.view(spec.shape)
            adapter[spec.key] = torch.empty(spec.shape, dtype=spec.dtype).copy_(shaped)
        return adapter

    def unpack_several(self, tokens: Tensor) -> dict[str, Tensor]:
        """Returns the adapters of ``[adapters, tokens, token_dim]``, as ``{file key: [adapters,
        ...shape]}`` in the dtype of the tokens; gradients flow through them."""
        adapters = {}
        # The gradient of `split` is put together once; that of an index is as large as all tokens.
        for spec, own in zip(
            self.tensors, tokens.split_with_sizes(self.counts, dim=1), strict=True
        ):
            values = own.flatten(1)[:, : spec.size]
            shape = spec.shape[::-1] if spec.by_columns else spec.shape
            several = values.reshape(-1, *shape)
            adapters[spec.key] = several.mT if spec.by_columns else several
        return adapters

    def check(self, adapter: Mapping[str, Tensor]) -> None:
        """Raises DataError naming the first tensor that this layout does not expect."""
        expected = {spec.key: torch.Size(spec.shape) for spec in self.tensors}
        problem = shape_mismatch(expected, {key: t.shape for key, t in adapter.items()})
        if problem:
            raise DataError(problem)

    def mask(self) -> Tensor:
        """Returns ``[tokens, token_dim]`` bool: True on values, False on padding."""
        mask = torch.zeros(self.tokens * self.token_dim, dtype=torch.bool)
        for spec, start in zip(self.tensors, self.starts, strict=True):
            mask[start * self.token_dim :][: spec.size] = True
        return mask.view(self.tokens, self.token_dim)

    def owners(self) -> np.ndarray:
        """Returns ``[tokens]`` int64: the index of the tensor that each token belongs to."""
        return np.repeat(np.arange(len(self.tensors)), self.counts)

    def grid(self) -> TokenGrid:
        """Returns the layout as a decoder gets it: the origin of each token, as integers."""
        owners = self.owners()

        def codes(labels: list[Any]) -> np.ndarray:
            """Returns ``[tokens]``: the index of each token's label among the sorted labels."""
            by_tensor = np.unique(np.array(labels), return_inverse=True)[1].astype(np.int64)
            by_token: np.ndarray = by_tensor[owners]
            return by_token

        return TokenGrid(
            tokens=self.tokens,
            token_dim=self.token_dim,
            layer=codes([spec.layer for spec in self.tensors]),
            module=codes([spec.module for spec in self.tensors]),
            matrix=codes([spec.matrix for spec in self.tensors]),
            position=np.arange(self.tokens) - np.array(self.starts, dtype=np.int64)[owners],
        )

    def state(self) -> dict[str, Any]:
        """Returns the layout as plain data, for a generator's file."""
        tensors = [
            [s.key, list(s.shape), str(s.dtype).removeprefix("torch.")] for s in self.tensors
        ]
        return {"token_dim": self.token_dim, "tensors": tensors}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Layout":
        """Returns the layout of `state()`. Raises DataError as `of`; of what is no such state,
        whatever reading it raises."""
        empty = {
            key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
            for key, shape, dtype in state["tensors"]
        }
        return cls.of(empty, state["token_dim"])
