"""A contestant that knows the task, which a generator has to read from prompts."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from loragen.core.adapter.files import Adapter
from loragen.core.evaluation.contestants import Contestant, Entry, EvaluationSetup
from loragen.core.evaluation.targets import Target
from loragen.core.run.checkpoints import read_checkpointed_adapter
from loragen.demo.world import STYLES, VALUES

PENALTY = 0.03  # of the regression; it may be small, since attributes and styles repeat


class KnownTask(Contestant):
    """A ridge regression of the last adapters of all collected datasets on their attribute and
    style. If it fails on a new combination, adapters are not additive, and an additive decoder
    cannot succeed, however well it reads the prompts."""

    name, title, needs_sources = "known_task", "known task", True

    def __init__(self, setup: EvaluationSetup) -> None:
        super().__init__(setup)
        self.adapters = [read_checkpointed_adapter(one.checkpoints[-1]) for one in setup.sources]
        weights = torch.stack([_flat(adapter) for adapter in self.adapters])  # (D, values)
        parts = torch.stack([_one_hot(source.name) for source in setup.sources])  # (D, parts)
        kernel = parts @ parts.T + PENALTY * torch.eye(len(parts))
        self.parts = parts.T @ torch.linalg.solve(kernel, weights)  # (parts, values)

    def entries(self, target: Target, targets: Sequence[Target]) -> Iterator[Entry]:
        like = self.adapters[0]
        sizes = [tensor.numel() for tensor in like.tensors.values()]
        values = (_one_hot(target.name) @ self.parts).split(sizes)
        tensors = {
            key: value.view_as(tensor)
            for (key, tensor), value in zip(like.tensors.items(), values, strict=True)
        }
        yield Entry(Adapter(like.config, tensors))


def _flat(adapter: Adapter) -> Tensor:
    return torch.cat([tensor.flatten().float() for tensor in adapter.tensors.values()])


def _one_hot(name: str) -> Tensor:
    """Returns ``[parts]``: 1 for the attribute and for the style, 0 for the others."""
    attribute, style = name.split("-")
    return torch.tensor([float(part in (attribute, style)) for part in (*VALUES, *STYLES)])
