"""What could be generated for a task that is told, and need not be read in prompts."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from loragen.core.adapter.files import Adapter
from loragen.core.evaluation.contestants import Bench, Column, Entry
from loragen.core.evaluation.targets import Target
from loragen.core.run.checkpoints import read_checkpointed_adapter
from loragen.demo.world import ATTRIBUTES, STYLES

PENALTY = 0.03  # of the regression: anything small, since eight attributes and five styles repeat


class Told:
    """The last adapters of all collected datasets, taken for the sum of what their attribute and
    what their style add to the weights. Where this fails on a new combination, the weights do not
    add up, and no reading of prompts would help a decoder that adds."""

    def __init__(self, bench: Bench) -> None:
        self.adapters = [read_checkpointed_adapter(one.checkpoints[-1]) for one in bench.sources]
        weights = torch.stack([_flat(adapter) for adapter in self.adapters])  # (D, values)
        known = torch.stack([_told(source.name) for source in bench.sources])  # (D, parts)
        kernel = known @ known.T + PENALTY * torch.eye(len(known))
        self.parts = known.T @ torch.linalg.solve(kernel, weights)  # (parts, values)

    def entries(self, target: Target, targets: Sequence[Target]) -> Iterator[Entry]:
        like = self.adapters[0]
        sizes = [tensor.numel() for tensor in like.tensors.values()]
        values = (_told(target.name) @ self.parts).split(sizes)
        tensors = {
            key: value.view_as(tensor)
            for (key, tensor), value in zip(like.tensors.items(), values, strict=True)
        }
        yield Entry(Adapter(like.config, tensors))


TOLD = Column("told", "told the task", f"{__name__}:{Told.__name__}", needs_sources=True)


def _flat(adapter: Adapter) -> Tensor:
    return torch.cat([tensor.flatten().float() for tensor in adapter.tensors.values()])


def _told(name: str) -> Tensor:
    """``[parts]``: 1 for the attribute and for the style, 0 for the others."""
    attribute, style = name.split("-")
    return torch.tensor([float(part in (attribute, style)) for part in (*ATTRIBUTES, *STYLES)])
