"""What a decoder is made of, stage by stage: shapes, parameters and memory, before it is built."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from loragen.core.generator.layout import Layout
from loragen.core.generator.network import new_network
from loragen.core.protocols import TellsChoices

FLOAT = 4  # bytes
OPTIMIZER_FLOATS = 3  # a gradient and Adam's two moments for every trained parameter


@dataclass(frozen=True)
class Stage:
    name: str
    shape: tuple[int, ...]
    """Of the output, for a batch of one."""
    parameters: int

    @property
    def bytes(self) -> int:
        """Of the output, in float32."""
        return prod(self.shape) * FLOAT


@dataclass(frozen=True)
class Anatomy:
    condition: tuple[int, int, int]
    """``[prompts, positions, dim]`` that it was worked out for."""
    stages: list[Stage]
    parameters: int
    trained: int
    choices: list[str]
    """What the decoder has settled itself, in its own words."""

    @property
    def weights_bytes(self) -> int:
        return self.parameters * FLOAT

    @property
    def training_bytes(self) -> int:
        """Weights, gradients and moments; `pair_bytes` come on top for each pair of a batch."""
        return self.weights_bytes + self.trained * OPTIMIZER_FLOATS * FLOAT

    @property
    def pair_bytes(self) -> int:
        """Of the outputs of all stages together."""
        return sum(stage.bytes for stage in self.stages)

    def document(self) -> dict[str, Any]:
        """Plain data."""
        sizes = ("weights_bytes", "training_bytes", "pair_bytes")
        stages = [{**asdict(stage), "bytes": stage.bytes} for stage in self.stages]
        return {**asdict(self), "stages": stages, **{name: getattr(self, name) for name in sizes}}


def anatomy(
    decoder: str,
    options: Mapping[str, Any],
    layout: Layout,
    condition: tuple[int, int, int],
    transfers: bool = False,
) -> Anatomy:
    """Of a decoder for `layout`, fed with a condition ``[prompts, positions, dim]``; trained to
    transfer or as a whole.

    On torch's meta device: nothing is computed and nothing allocated. Raises UsageError where the
    options do not suit the layout.
    """
    with torch.device("meta"):
        network = new_network(decoder, options, condition[-1], layout).to("meta")
        mask = torch.ones(1, *condition[:2], dtype=torch.bool)
        found: list[Stage] = []
        for name, module in _parts(network.decoder, ""):
            module.register_forward_hook(_recorder(name, found))
        network.eval()(torch.empty(1, *condition), mask)
    if transfers:
        network.transfers.train_transfer_only()
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    decided = network.decoder.choices() if isinstance(network.decoder, TellsChoices) else []
    return Anatomy(condition, found, _size(network), trained, decided)


def _parts(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """The children of a module; of a lone child or a list, its own children in its place."""
    children = dict(module.named_children())
    for name, child in children.items():
        path = f"{prefix}{name}"
        if isinstance(child, nn.ModuleList):
            yield from ((f"{path}.{index}", one) for index, one in enumerate(child))
        elif len(children) == 1 and any(True for _ in child.children()):
            yield from _parts(child, "")
        else:
            yield path, child


def _recorder(name: str, found: list[Stage]) -> Any:
    def record(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            found.append(Stage(name, tuple(output.shape[1:]), _size(module)))

    return record


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
