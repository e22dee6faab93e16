"""The contract of an objective. Torch is imported only when the check is called."""

from __future__ import annotations

from typing import Any

from loragen.core.protocols import Metric
from loragen.testing._common import trainable, validated_options


def check_objective(cls: Any, data: Any, network: Any, **options: Any) -> None:
    """Checks that an objective makes batches, a loss and validation metrics.

    `data` is a `TrainingData`, or a stand-in with what the objective reads from it; `network` maps
    a condition and its mask to adapters. Steps, learning rate and batch size are positive. A
    batch depends on its index alone, not on the batches before it, and two processes share it. The
    loss is a finite scalar whose gradient reaches a trainable parameter; metrics are detached, and
    `loss` is among them. `validate` gives finite metrics, `metric.name` among them.
    """
    import torch

    name, config = cls.__name__, validated_options(cls, options)
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
