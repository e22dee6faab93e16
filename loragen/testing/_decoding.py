"""What decoders are tried on, and what holds of anything that they make of a condition."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from loragen.core.protocols import TokenGrid
from loragen.testing._common import TOLERANCE, distance, saved_and_loaded

if TYPE_CHECKING:
    from torch import Tensor

    Answer = Callable[[Tensor, Tensor], Tensor]
    """``condition [batch, prompts, positions, dim]``, its mask -> ``[batch, ...]``."""

CONDITION_DIM, POSITIONS = 12, 2


def grid(layers: int = 2, modules: int = 2, positions: int = 3, token_dim: int = 8) -> TokenGrid:
    """A small adapter: `positions` tokens for lora_A and lora_B of each module of each layer."""
    import numpy as np

    axes = [a.reshape(-1).astype(np.int64) for a in np.indices((layers, modules, 2, positions))]
    return TokenGrid(axes[0].size, token_dim, *axes)


def conditions(batch: int, prompts: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Conditions and a mask that leaves a position of every prompt and, of several, a prompt."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    condition = torch.randn(batch, prompts, POSITIONS, CONDITION_DIM, generator=generator)
    mask = torch.ones(batch, prompts, POSITIONS, dtype=torch.bool)
    mask[:, ::2, 1:] = False
    if prompts > 1:
        mask[0, -1] = False
    return condition, mask


def check_answer(answer: Answer, what: str, shape: tuple[int, ...]) -> None:
    """`shape` is what two items have; `what` is how messages call the answer."""
    _check_shape(answer, what, shape)
    _check_mask(answer, what)
    _check_batch_independence(answer, what)


def _check_shape(answer: Answer, what: str, expected: tuple[int, ...]) -> None:
    for prompts in (1, 3, 40):
        condition, mask = conditions(2, prompts)
        given = answer(condition, mask)
        shape = tuple(given.shape)
        assert shape == expected, f"{what}: {prompts} prompts give {shape}, not {expected}"
        assert given.isfinite().all(), f"{what}: {prompts} prompts give values that are not finite"
        assert given.equal(answer(condition, mask)), f"{what}: not deterministic in eval mode"


def _check_mask(answer: Answer, what: str) -> None:
    import torch

    condition, mask = conditions(2, 3)
    expected = answer(condition, mask)
    noisy = torch.where(mask[..., None], condition, 3.0)
    assert distance(answer(noisy, mask), expected) <= TOLERANCE, f"masked values change the {what}"
    padded = torch.cat([condition, torch.full_like(condition, 3.0)], dim=1)
    padded_mask = torch.cat([mask, torch.zeros_like(mask)], dim=1)
    assert distance(answer(padded, padded_mask), expected) <= TOLERANCE, (
        f"masked prompts appended to the condition change the {what}"
    )


def _check_batch_independence(answer: Answer, what: str) -> None:
    condition, mask = conditions(3, 3)
    together = answer(condition, mask)
    for item in range(3):
        alone = answer(condition[item : item + 1], mask[item : item + 1])
        difference = distance(alone[0], together[item])
        assert difference <= TOLERANCE, f"{what}: an item depends on its batch: by {difference:.1e}"


def check_state_dict(decoder: Any, fresh: Any) -> None:
    """A fresh decoder takes over all that decides what this one writes."""
    fresh.load_state_dict(saved_and_loaded(decoder))
    condition, mask = conditions(2, 3)
    assert decoder(condition, mask).equal(fresh(condition, mask)), (
        "a fresh decoder with the loaded state dict gives another output: something is not in it"
    )


def check_gradients(given: Tensor, what: str, tensors: Mapping[str, Tensor]) -> None:
    """Gradients of `given` reach each of the tensors, and change one of them at least."""
    import torch

    assert given.requires_grad, f"{what}: it carries no gradient"
    torch.autograd.backward((given - 1.0).square().mean())
    for name, tensor in tensors.items():
        assert tensor.grad is not None, f"{what}: no gradient reaches {name}"
        assert tensor.grad.isfinite().all(), f"{what}: the gradient of {name} is not finite"
    assert any(t.grad is not None and t.grad.any() for t in tensors.values()), (
        f"{what}: every gradient is zero"
    )
