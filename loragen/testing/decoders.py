"""The contract of a decoder. Imports torch only when a check is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from loragen.core.protocols import StartsFromSamples, TokenGrid, Transfers
from loragen.testing._common import (
    TOLERANCE,
    built,
    disturb,
    largest_difference,
    saved_and_loaded,
    trainable,
    validated_options,
)

if TYPE_CHECKING:
    from torch import Tensor

    Decode = Callable[[Tensor, Tensor], Tensor]
    "``condition [batch, prompts, positions, dim]``, its mask -> ``[batch, tokens, token_dim]``."

CONDITION_DIM, POSITIONS = 12, 2
DATASETS = 6
FIT_TOLERANCE = 1e-4  # of the largest value: a fitted decoder sums in another order


def check_decoder(cls: Any, **options: Any) -> None:
    """Checks that a decoder is an `nn.Module` from a condition to the tokens of an adapter.

    `[batch, prompts, positions, dim]` and a boolean mask give finite `[batch, tokens, token_dim]`
    for 1, 3 and 40 prompts. Masked values, and padding under the mask, change nothing; in eval mode
    the output is deterministic, and that of an item does not depend on the rest of its batch.
    Gradients reach every trainable parameter and the condition. The state dict, saved and loaded
    with `weights_only=True`, gives an equal decoder.

    A decoder that can transfer with these options has to keep the promises of `Transfers` too. Its
    coordinates are finite `[samples, R]`, without gradients. For a support set of one dataset or of
    several, `predict` keeps the promises of the output above, and its gradients reach all of
    `transfer_parameters`. After `fit`, which forgets earlier calls, the decoder itself gives what
    `predict` gave and still gives, and so does a decoder with the loaded state dict.

    Raises AssertionError naming the promise that is broken.
    """
    import torch

    torch.manual_seed(0)
    config = validated_options(cls, options)
    decoder, fresh = (built(cls, config, CONDITION_DIM, grid()) for _ in range(2))
    disturb(decoder.parameters())
    _check_output(decoder, "output")
    _check_state_dict(decoder, fresh)
    trained = trainable(decoder)
    assert trained, "there is no trainable parameter"
    condition, mask = example_conditions(2, 3)
    output = decoder.train()(condition.requires_grad_(), mask)
    _check_gradients(output, "output", trained)
    assert condition.grad is not None and condition.grad.any(), "the output ignores the condition"
    assert condition.grad.isfinite().all(), "the gradient of the condition is not finite"
    _check_transfer(cls, config)


def grid(layers: int = 2, modules: int = 2, positions: int = 3, token_dim: int = 8) -> TokenGrid:
    """Returns a small adapter: `positions` tokens for lora_A and lora_B of each module."""
    import numpy as np

    axes = [a.reshape(-1).astype(np.int64) for a in np.indices((layers, modules, 2, positions))]
    return TokenGrid(axes[0].size, token_dim, *axes)


def example_conditions(batch: int, prompts: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Returns conditions, and a mask that hides some positions and one of several prompts."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    condition = torch.randn(batch, prompts, POSITIONS, CONDITION_DIM, generator=generator)
    mask = torch.ones(batch, prompts, POSITIONS, dtype=torch.bool)
    mask[:, ::2, 1:] = False
    if prompts > 1:
        mask[0, -1] = False
    return condition, mask


class ExampleSamples:
    """One adapter of each dataset, with the protocol `Samples`."""

    def __init__(self) -> None:
        import torch

        generator = torch.Generator().manual_seed(0)
        self.shape = (DATASETS, grid().tokens, grid().token_dim)
        self._values = torch.randn(self.shape, generator=generator)

    def __getitem__(self, tokens: slice) -> Tensor:
        return self._values[:, tokens]


def _check_output(decode: Decode, what: str) -> None:
    """Checks the promises of an output; `what` names it in messages."""
    import torch

    expected = (2, grid().tokens, grid().token_dim)
    for prompts in (1, 3, 40):
        condition, mask = example_conditions(2, prompts)
        given = decode(condition, mask)
        shape = tuple(given.shape)
        assert shape == expected, f"{what}: {prompts} prompts give {shape}, not {expected}"
        assert given.isfinite().all(), f"{what}: {prompts} prompts give values that are not finite"
        assert given.equal(decode(condition, mask)), f"{what}: not deterministic in eval mode"

    condition, mask = example_conditions(2, 3)
    output = decode(condition, mask)
    noisy = torch.where(mask[..., None], condition, 3.0)
    assert largest_difference(decode(noisy, mask), output) <= TOLERANCE, (
        f"masked values change the {what}"
    )
    padded = torch.cat([condition, torch.full_like(condition, 3.0)], dim=1)
    padded_mask = torch.cat([mask, torch.zeros_like(mask)], dim=1)
    assert largest_difference(decode(padded, padded_mask), output) <= TOLERANCE, (
        f"masked prompts appended to the condition change the {what}"
    )

    condition, mask = example_conditions(3, 3)
    together = decode(condition, mask)
    for item in range(3):
        alone = decode(condition[item : item + 1], mask[item : item + 1])
        difference = largest_difference(alone[0], together[item])
        assert difference <= TOLERANCE, f"{what}: an item depends on its batch: by {difference:.1e}"


def _check_state_dict(decoder: Any, fresh: Any) -> None:
    fresh.load_state_dict(saved_and_loaded(decoder))
    condition, mask = example_conditions(2, 3)
    assert decoder(condition, mask).equal(fresh(condition, mask)), (
        "a fresh decoder with the loaded state dict gives another output: something is not in it"
    )


def _check_gradients(given: Tensor, what: str, tensors: Mapping[str, Tensor]) -> None:
    """Checks that gradients of `given` reach each of the tensors, and that one is not zero."""
    import torch

    assert given.requires_grad, f"{what}: it carries no gradient"
    torch.autograd.backward((given - 1.0).square().mean())
    for name, tensor in tensors.items():
        assert tensor.grad is not None, f"{what}: no gradient reaches {name}"
        assert tensor.grad.isfinite().all(), f"{what}: the gradient of {name} is not finite"
    assert any(t.grad is not None and t.grad.any() for t in tensors.values()), (
        f"{what}: every gradient is zero"
    )


def _check_transfer(cls: Any, config: Any) -> None:
    """Calls the decoder in the order of a training, if it can transfer with these options."""
    import torch

    if not hasattr(cls, "transfer_parameters"):
        return
    promised = [name for name in vars(Transfers) if not name.startswith("_")]
    missing = [name for name in promised if not hasattr(cls, name)]
    assert not missing, f"{cls.__name__} has transfer_parameters, but no {', '.join(missing)}"
    prefixes = cls.transfer_parameters(config)
    if prefixes is None:
        return
    decoder = built(cls, config, CONDITION_DIM, grid())
    if isinstance(decoder, StartsFromSamples):
        decoder.start_from(ExampleSamples())
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad_(name.startswith(tuple(prefixes)))
    trained = trainable(decoder)
    assert trained, f"no parameter's name starts with one of transfer_parameters, {prefixes}"
    disturb(trained.values())

    targets: Tensor = decoder.coordinates(ExampleSamples())
    shape = list(targets.shape)
    assert targets.ndim == 2 and shape[0] == DATASETS, (
        f"coordinates of {DATASETS} samples must be [{DATASETS}, R], not {shape}"
    )
    assert targets.isfinite().all(), "coordinates gives values that are not finite"
    assert not targets.requires_grad, (
        "coordinates carries gradients, and no second step could follow them: detach() it"
    )

    known, known_mask = example_conditions(DATASETS, 3, seed=1)

    def predict(condition: Tensor, mask: Tensor, datasets: int = DATASETS) -> Tensor:
        others = known[:datasets], known_mask[:datasets], targets[:datasets]
        predicted: Tensor = decoder.predict(condition, mask, *others)
        return predicted

    for datasets in (1, DATASETS):
        decode = partial(predict, datasets=datasets)
        _check_output(decode, f"predict (other datasets: {datasets})")
    decoder.train()
    _check_gradients(predict(*example_conditions(2, 3)), "predict", trained)
    decoder.eval()

    condition, mask = example_conditions(3, 3)
    with torch.no_grad():
        expected = predict(condition, mask)
        one_by_one = [(known[i : i + 1], known_mask[i : i + 1]) for i in range(DATASETS)]
        for coordinates in (-targets, targets):  # a training fits the decoder many times
            decoder.fit(iter(one_by_one), coordinates)
        still, decoded = predict(condition, mask), decoder(condition, mask)
    tolerance = FIT_TOLERANCE * float(expected.abs().max())
    assert (off := largest_difference(still, expected)) <= tolerance, (
        f"fit changes what predict gives, and so what is trained: by {off:.1e}"
    )
    assert (off := largest_difference(decoded, expected)) <= tolerance, (
        f"after fit the decoder does not give what predict gave: off by {off:.1e}"
    )
    _check_state_dict(decoder, built(cls, config, CONDITION_DIM, grid()))
