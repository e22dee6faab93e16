"""The contract of an objective. Torch is imported only when the check is called."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from loragen.core.protocols import Metric
from loragen.testing._common import trainable, validated_options
from loragen.testing.decoders import CONDITION_DIM, example_conditions, grid

if TYPE_CHECKING:
    from torch import Tensor


def check_objective(cls: Any, data: Any = None, network: Any = None, **options: Any) -> None:
    """Checks that an objective makes batches, a loss and validation metrics.

    `data` is a `TrainingData`, or a stand-in with what the objective reads from it; by default, an
    `ExampleTraining`. `network` maps a condition and its mask to adapters; by default, it is one
    linear layer. Steps, learning rate and batch size are positive. A
    batch depends on its index alone, not on the batches before it, and two processes share it. The
    loss is a finite scalar whose gradient reaches a trainable parameter; metrics are detached, and
    `loss` is among them. `validate` gives finite metrics, `metric.name` among them.
    """
    import torch

    name, config = cls.__name__, validated_options(cls, options)
    data = data or ExampleTraining()
    network = network or example_network()
    objective, again = (cls(config, data) for _ in range(2))
    for attribute in ("steps", "learning_rate", "batch_size"):
        value = getattr(objective, attribute)
        assert value > 0, f"{name}.{attribute} is {value}; it must be positive"
    assert isinstance(objective.metric, Metric), f"{name}.metric is {objective.metric!r}, no Metric"

    batches, others = objective.batches(0, 1), again.batches(0, 1)
    for index in (3, 0, 1):
        one, other = batches[index], others[index]
        for part in ("condition", "mask", "tokens"):
            assert getattr(one, part).equal(getattr(other, part)), (
                f"{name}: batch {index} has another {part} the second time"
            )
        others[index + 1]
    batch = batches[0]
    size = len(batch.tokens)
    assert size == objective.batch_size, (
        f"{name}.batch_size is {objective.batch_size}, and a batch has {size} pairs"
    )
    if size % 2 == 0:
        shares = [len(objective.batches(process, 2)[0].tokens) for process in range(2)]
        assert shares == [size // 2] * 2, (
            f"{name}: two processes share a batch of {size} pairs as {shares}"
        )

    loss, metrics = objective.loss(network, batch)
    assert loss.ndim == 0 and loss.isfinite(), f"{name}.loss gives {loss}, not a finite scalar"
    assert loss.requires_grad, f"{name}.loss carries no gradient"
    assert "loss" in metrics, f"{name}.loss has no 'loss' among its metrics: {sorted(metrics)}"
    attached = [key for key, value in metrics.items() if value.requires_grad]
    assert not attached, f"{name}.loss gives metrics with gradients: {attached}; detach() them"
    loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in trainable(network).values()), (
        f"{name}: the gradient of the loss reaches no parameter of the network"
    )

    objective.finalize(network)
    with torch.no_grad():
        found = objective.validate(network, batch)
    assert objective.metric.name in found, (
        f"{name}.validate gives {sorted(found)}, without its metric '{objective.metric.name}'"
    )
    infinite = [key for key, value in found.items() if not torch.as_tensor(value).isfinite()]
    assert not infinite, f"{name}.validate gives values that are not finite: {infinite}"


class ExampleBatch(NamedTuple):
    """Conditions, each with an adapter."""

    condition: Tensor
    mask: Tensor
    tokens: Tensor


class ExampleTraining:
    """What most objectives read of a `TrainingData`, with random adapters of the grid `grid()`."""

    def __init__(self, batch_size: int = 4) -> None:
        places = grid()
        self.config = SimpleNamespace(seed=42, data=SimpleNamespace(batch_size=batch_size))
        self.layout = SimpleNamespace(tokens=places.tokens, token_dim=places.token_dim)
        self.normalization = ExampleNormalization()

    def pairs(self, process_index: int = 0, num_processes: int = 1) -> ExamplePairs:
        return ExamplePairs(self, process_index, num_processes)


class ExampleNormalization:
    """A `Normalization` of mean 0 and scale 1/2."""

    def normalize(self, tokens: Tensor) -> Tensor:
        return 2 * tokens

    def denormalize(self, normalized: Tensor) -> Tensor:
        return normalized / 2

    def to(self, device: Any) -> ExampleNormalization:  # noqa: ARG002  # it holds no tensors
        return self


class ExamplePairs:
    """Item k is a process's share of micro-batch k, a pure function of both."""

    def __init__(self, data: ExampleTraining, process_index: int, num_processes: int) -> None:
        self.data, self.process_index, self.num_processes = data, process_index, num_processes

    def __getitem__(self, k: int) -> ExampleBatch:
        import torch

        size, layout = self.data.config.data.batch_size, self.data.layout
        generator = torch.Generator().manual_seed(k)
        tokens = torch.randn(size, layout.tokens, layout.token_dim, generator=generator)
        whole = (*example_conditions(size, 3, seed=k), tokens)
        return ExampleBatch(*(part[self.process_index :: self.num_processes] for part in whole))


def example_network() -> Any:
    """Returns an `nn.Module` from a condition and its mask to adapters of the grid `grid()`."""
    import torch

    places = grid()

    class Linear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(CONDITION_DIM, places.tokens * places.token_dim)

        def forward(self, condition: Tensor, mask: Tensor) -> Tensor:
            read = torch.where(mask[..., None], condition, 0.0).mean(dim=(1, 2))
            written: Tensor = self.linear(read).view(-1, places.tokens, places.token_dim)
            return written

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Linear()
