"""Reconstruction: the generated adapter should have the weights of the collected one.

The loss and its gradient are computed in one pass over memory, in chunks that stay in a core's
cache. As separate operations, the error of adapters of 4.4 M values would need some twenty passes
and as many temporary tensors.
"""

from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor
from torch.autograd.function import once_differentiable

from loragen.core.generator.network import Network, Normalization
from loragen.core.learning.data import PairBatch, PairBatches, TrainingData
from loragen.core.protocols import Automatic, Metric, Objective

CHUNK_ON_CPU = 2**15  # values of all adapters at a time: 128 KiB of each temporary in float32
CHUNK_ELSEWHERE = 2**26  # 256 MiB: a GPU has the bandwidth, and launching costs it more

Losses = tuple[Tensor, dict[str, Tensor]]
"""The loss to minimise, and detached metrics."""


class Reconstruction(Objective):
    """Minimises the error of the generated weights against the collected ones."""

    automatic = Automatic(30, "reconstruction", "it needs nothing but collected adapters")
    learning_rate_key = "training.learning_rate"

    class Config(BaseModel, extra="forbid"):
        """There are no options here: they are in the section `training`."""

    def __init__(self, options: Config, data: TrainingData) -> None:  # noqa: ARG002  # no options
        training = data.config.training
        self.data, self.error = data, ReconstructionError(data)
        self.target_noise = training.target_noise
        steps = training.max_epochs * data.pairs().steps_per_epoch
        self.steps = min(steps, training.max_steps or steps)
        self.learning_rate, self.batch_size = training.learning_rate, data.config.data.batch_size
        self.metric = RECONSTRUCTION_METRIC

    def batches(self, process_index: int, num_processes: int) -> PairBatches:
        return self.data.pairs(process_index, num_processes)

    def loss(self, network: Network, batch: PairBatch) -> Losses:
        return self.error(network(batch.condition, batch.mask), batch.tokens, self.target_noise)

    def validate(self, network: Network, batch: PairBatch) -> dict[str, Tensor]:
        return self.error.metrics(network(batch.condition, batch.mask), batch.tokens)

    def to(self, device: torch.device) -> None:
        self.error.to(device)


RECONSTRUCTION_METRIC = Metric("loss", "the reconstruction error")


class ReconstructionError:
    """``mse_weight · MSE + l1_weight · L1`` on normalised tokens, without the padding.

    With `training.importance`, an error counts more in tokens on which the checkpoints of a dataset
    agree (see `TrainingData.token_weights`).
    """

    def __init__(self, data: TrainingData) -> None:
        self.normalization, self.mask = data.normalization, data.layout.mask()
        self.weights = self.mask * data.token_weights / self.mask.sum()  # sums to 1
        self.mse_weight = data.config.training.mse_weight
        self.l1_weight = data.config.training.l1_weight

    def to(self, device: torch.device) -> None:
        self.normalization = self.normalization.to(device)
        self.weights, self.mask = self.weights.to(device), self.mask.to(device)

    def __call__(self, predicted: Tensor, target: Tensor, noise: float = 0.0) -> Losses:
        """Returns the loss and its parts, for ``[batch, tokens, token_dim]``: `predicted` is
        normalised, `target` is not.

        `noise` is the standard deviation of Gaussian noise on the normalised target.
        """
        weights = self.weights, self.mse_weight, self.l1_weight
        loss, mse, l1 = WeightedError.apply(  # type: ignore[no-untyped-call]  # untyped in torch
            predicted, target, self.normalization, *weights, noise
        )
        return loss, {"loss": loss.detach(), "mse": mse, "l1": l1}

    @torch.no_grad()
    def metrics(self, predicted: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Returns the loss and its parts, and the error of the weights in their own units."""
        error = (
            predicted.float() - self.normalization.normalize(target)
        ) * self.normalization.scale
        error = torch.where(self.mask, error, 0.0)
        count = self.mask.sum() * len(error)
        norm = torch.linalg.vector_norm(torch.where(self.mask, target, 0.0))
        return self(predicted, target)[1] | {
            "mae": error.abs().sum() / count,
            "rmse": (error.square().sum() / count).sqrt(),
            "relative_error": torch.linalg.vector_norm(error) / norm,
        }


class WeightedError(torch.autograd.Function):
    """Computes ``mse_weight · mse + l1_weight · l1``, and mse and l1 without a gradient.

    `predicted` is normalised, `target` is not, both ``[batch, tokens, token_dim]``; `weights` are
    ``[tokens, token_dim]`` and sum to 1.
    """

    @staticmethod
    def forward(
        ctx: Any,
        predicted: Tensor,
        target: Tensor,
        normalization: Normalization,
        weights: Tensor,
        mse_weight: float,
        l1_weight: float,
        noise: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, tokens, dim = predicted.shape
        # A gradient in float16 would underflow: the loss is scaled up only after it is computed.
        dtype = torch.float32 if predicted.dtype == torch.float16 else predicted.dtype
        gradient = torch.empty_like(predicted, dtype=dtype) if ctx.needs_input_grad[0] else None
        ctx.dtype = predicted.dtype
        mse, l1 = weights.new_zeros(()), weights.new_zeros(())
        chunk = CHUNK_ON_CPU if predicted.device.type == "cpu" else CHUNK_ELSEWHERE
        step = max(1, chunk // (batch * dim))
        for first in range(0, tokens, step):
            here = slice(first, first + step)
            error = predicted[:, here].float() - normalization.of(here).normalize(target[:, here])
            if noise:
                error -= noise * torch.randn_like(error)
            sign, weighted = error.sign(), error * weights[here]
            mse += (error * weighted).sum()
            l1 += (sign * weighted).sum()
            if gradient is not None:
                slope = weighted.mul_(2 * mse_weight).addcmul_(sign, weights[here], value=l1_weight)
                gradient[:, here] = slope.div_(batch)
        mse, l1 = mse / batch, l1 / batch
        ctx.mark_non_differentiable(mse, l1)
        ctx.save_for_backward(gradient)
        return mse_weight * mse + l1_weight * l1, mse, l1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return ((gradient * slope.to(gradient.dtype)).to(ctx.dtype), *[None] * 6)
