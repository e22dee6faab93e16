"""The reconstruction error and its gradient in one pass.

Written as separate operations, the error of adapters of 4.4 M values takes some twenty passes over
memory and as many temporary tensors; in chunks that stay in a core's cache it takes one.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loragen.core.generator.network import Normalization

CHUNK_ON_CPU = 2**15  # values of all adapters at a time: 128 KiB of each temporary in float32
CHUNK_ELSEWHERE = 2**26  # 256 MiB: a GPU has the bandwidth, and launching costs it more


def weighted_error(
    written: Tensor,
    target: Tensor,
    normalization: Normalization,
    weights: Tensor,
    *,
    mse_weight: float,
    l1_weight: float,
    noise: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """``mse_weight · mse + l1_weight · l1``, and mse and l1 on their own, without a gradient.

    `written` is normalised, `target` is not, both ``[batch, tokens, token_dim]``; `weights` are
    ``[tokens, token_dim]`` and sum to 1; `noise` is the standard deviation of what is added to the
    normalised target.
    """
    loss, mse, l1 = _WeightedError.apply(  # type: ignore[no-untyped-call]  # torch's
        written, target, normalization, weights, mse_weight, l1_weight, noise
    )
    return loss, mse, l1


class _WeightedError(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        written: Tensor,
        target: Tensor,
        normalization: Normalization,
        weights: Tensor,
        mse_weight: float,
        l1_weight: float,
        noise: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, tokens, dim = written.shape
        # In float16 it would underflow: the loss is scaled up only after it is known.
        kept = torch.float32 if written.dtype == torch.float16 else written.dtype
        gradient = torch.empty_like(written, dtype=kept) if ctx.needs_input_grad[0] else None
        ctx.dtype = written.dtype
        mse, l1 = weights.new_zeros(()), weights.new_zeros(())
        chunk = CHUNK_ON_CPU if written.device.type == "cpu" else CHUNK_ELSEWHERE
        step = max(1, chunk // (batch * dim))
        for first in range(0, tokens, step):
            here = slice(first, first + step)
            error = written[:, here].float() - normalization.of(here).normalize(target[:, here])
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
