"""What decoders are tried on, and what holds of anything that they make of a condition.

The promise of a decoder that writes adapters from what is known of other datasets alone.

It is asked what a training asks it, in that order: it starts from examples, leaves gradients to
what transfers, tells the examples' coordinates, and is settled before it is used.

The promise of a decoder. Imports torch only when called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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

    Answer = Callable[[Tensor, Tensor], Tensor]
    "``condition [batch, prompts, positions, dim]``, its mask -> ``[batch, ...]``."

CONDITION_DIM, POSITIONS = 12, 2


def grid(layers: int = 2, modules: int = 2, positions: int = 3, token_dim: int = 8) -> TokenGrid:
    """A small adapter: `positions` tokens for lora_A and lora_B of each module of each layer."""
    import numpy as np

    axes = [a.reshape(-1).astype(np.int64) for a in np.indices((layers, modules, 2, positions))]
    return TokenGrid(axes[0].size, token_dim, *axes)


def example_conditions(batch: int, prompts: int, seed: int = 0) -> tuple[Tensor, Tensor]:
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
        condition, mask = example_conditions(2, prompts)
        given = answer(condition, mask)
        shape = tuple(given.shape)
        assert shape == expected, f"{what}: {prompts} prompts give {shape}, not {expected}"
        assert given.isfinite().all(), f"{what}: {prompts} prompts give values that are not finite"
        assert given.equal(answer(condition, mask)), f"{what}: not deterministic in eval mode"


def _check_mask(answer: Answer, what: str) -> None:
    import torch

    condition, mask = example_conditions(2, 3)
    expected = answer(condition, mask)
    noisy = torch.where(mask[..., None], condition, 3.0)
    assert largest_difference(answer(noisy, mask), expected) <= TOLERANCE, (
        f"masked values change the {what}"
    )
    padded = torch.cat([condition, torch.full_like(condition, 3.0)], dim=1)
    padded_mask = torch.cat([mask, torch.zeros_like(mask)], dim=1)
    assert largest_difference(answer(padded, padded_mask), expected) <= TOLERANCE, (
        f"masked prompts appended to the condition change the {what}"
    )


def _check_batch_independence(answer: Answer, what: str) -> None:
    condition, mask = example_conditions(3, 3)
    together = answer(condition, mask)
    for item in range(3):
        alone = answer(condition[item : item + 1], mask[item : item + 1])
        difference = largest_difference(alone[0], together[item])
        assert difference <= TOLERANCE, f"{what}: an item depends on its batch: by {difference:.1e}"


def check_state_dict(decoder: Any, fresh: Any) -> None:
    """A fresh decoder takes over all that decides what this one writes."""
    fresh.load_state_dict(saved_and_loaded(decoder))
    condition, mask = example_conditions(2, 3)
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


DATASETS = 6
SETTLED = 1e-4  # of the largest value: a settled decoder takes its sums in another order


class HeldSamples:
    """An adapter of each of the datasets, as `loragen.core.protocols.Samples`."""

    def __init__(self) -> None:
        import torch

        generator = torch.Generator().manual_seed(0)
        self.shape = (DATASETS, grid().tokens, grid().token_dim)
        self._values = torch.randn(self.shape, generator=generator)

    def __getitem__(self, tokens: slice) -> Tensor:
        return self._values[:, tokens]


def check_transfer(cls: Any, config: Any) -> None:
    """See `check_decoder`. Nothing is asked of a decoder that does not offer it."""
    if not _offered(cls, config):
        return
    decoder = _in_training(cls, config)
    coordinates = _checked_coordinates(decoder)
    _check_features(decoder)
    _check_transferred(decoder, coordinates)
    _check_transfer_training(decoder, coordinates)
    _check_settled(decoder.eval(), coordinates)
    check_state_dict(decoder, built(cls, config, CONDITION_DIM, grid()))


def _offered(cls: Any, config: Any) -> bool:
    if not hasattr(cls, "can_transfer"):
        return False
    promised = [name for name in vars(Transfers) if not name.startswith("_")]
    missing = [name for name in promised if not hasattr(cls, name)]
    assert not missing, f"{cls.__name__} has can_transfer, but no {', '.join(missing)}"
    return bool(cls.can_transfer(config))


def _in_training(cls: Any, config: Any) -> Any:
    """A decoder that has learned a little of what `train_transfer_only` lets it learn."""
    decoder = built(cls, config, CONDITION_DIM, grid())
    if isinstance(decoder, StartsFromSamples):
        decoder.start_from(HeldSamples())
    decoder.train_transfer_only()
    trained = trainable(decoder)
    assert trained, "train_transfer_only leaves nothing to train"
    disturb(trained.values())
    return decoder


def _checked_coordinates(decoder: Any) -> Tensor:
    """``[datasets, R]``"""
    coordinates: Tensor = decoder.coordinates(HeldSamples())
    shape = list(coordinates.shape)
    assert coordinates.ndim == 2 and shape[0] == DATASETS, (
        f"coordinates of {DATASETS} samples must be [{DATASETS}, R], not {shape}"
    )
    assert coordinates.isfinite().all(), "coordinates gives values that are not finite"
    assert not coordinates.requires_grad, (
        "coordinates carries gradients, and no second step could follow them: detach() it"
    )
    return coordinates


def _check_features(decoder: Any) -> None:
    shape = tuple(decoder.features(*example_conditions(2, 1)).shape)
    assert len(shape) == 2, f"features of 2 conditions must be [2, F], not {list(shape)}"
    check_answer(decoder.features, "features", (2, shape[1]))


def _check_transferred(decoder: Any, coordinates: Tensor) -> None:
    expected = (2, grid().tokens, grid().token_dim)
    for datasets in (1, DATASETS):
        written = _transferred(decoder, *example_conditions(2, 3), coordinates[:datasets])
        shape = tuple(written.shape)
        where = f"transferred (other datasets: {datasets})"
        assert shape == expected, f"{where} gives {shape}, not {expected}"
        assert written.isfinite().all(), f"{where} gives values that are not finite"


def _check_transfer_training(decoder: Any, coordinates: Tensor) -> None:
    written = _transferred(decoder.train(), *example_conditions(2, 3), coordinates)
    check_gradients(written, "transferred, after train_transfer_only", trainable(decoder))


def _check_settled(decoder: Any, coordinates: Tensor) -> None:
    import torch

    condition, mask = example_conditions(3, 3)
    with torch.no_grad():
        expected = _transferred(decoder, condition, mask, coordinates)
        known = _known(decoder)
        for told in (-coordinates, coordinates):  # a training settles time and again
            decoder.settle(known, told)
        still = _transferred(decoder, condition, mask, coordinates)
        written = decoder(condition, mask)
    tolerance = SETTLED * float(expected.abs().max())
    assert (off := largest_difference(still, expected)) <= tolerance, (
        f"settle changes what transferred gives, and so what is trained: by {off:.1e}"
    )
    assert (off := largest_difference(written, expected)) <= tolerance, (
        f"after settle the decoder does not write as transferred did: off by {off:.1e}"
    )


def _transferred(decoder: Any, condition: Tensor, mask: Tensor, coordinates: Tensor) -> Tensor:
    """From as many datasets as there are coordinates."""
    known = _known(decoder)[: len(coordinates)]
    written: Tensor = decoder.transferred(decoder.features(condition, mask), known, coordinates)
    return written


def _known(decoder: Any) -> Tensor:
    """The features of every dataset, ``[datasets, F]``."""
    features: Tensor = decoder.features(*example_conditions(DATASETS, 3, seed=1))
    return features


def check_decoder(cls: Any, **options: Any) -> None:
    """A decoder is an `nn.Module` from a condition to the tokens of an adapter.

    `[batch, prompts, positions, dim]` and a boolean mask become finite `[batch, tokens, token_dim]`
    for 1, 3 and 40 prompts. What is masked changes nothing, neither its values nor how much of it
    there is; in eval mode the answer is deterministic and an item's does not depend on the batch
    beside it. Gradients reach every trainable parameter and the condition. The state dict, saved
    and loaded with `weights_only=True`, gives an equal decoder.

    One that can transfer with these options keeps the promises of `Transfers` too. Its coordinates
    are finite `[samples, R]`, without gradients; its features are `[batch, F]`, and what is said of
    the output above holds of them. From one other dataset as from several, `transferred` gives
    finite `[batch, tokens, token_dim]`, whose gradients reach whatever `train_transfer_only` leaves
    trainable. After `settle`, on these datasets and no earlier ones, the decoder itself writes as
    `transferred` did, and still does; what was settled is in the state dict.
    """
    import torch

    torch.manual_seed(0)
    config = validated_options(cls, options)
    decoder, fresh = (built(cls, config, CONDITION_DIM, grid()) for _ in range(2))
    disturb(decoder.parameters())
    check_answer(decoder, "output", (2, grid().tokens, grid().token_dim))
    check_state_dict(decoder, fresh)
    _check_training(decoder)
    check_transfer(cls, config)


def _check_training(decoder: Any) -> None:
    trained = trainable(decoder)
    assert trained, "there is no trainable parameter"
    condition, mask = example_conditions(2, 3)
    output = decoder.train()(condition.requires_grad_(), mask)
    check_gradients(output, "output", trained)
    reached = condition.grad
    assert reached is not None and reached.any(), "the output ignores the condition"
    assert reached.isfinite().all(), "the gradient of the condition is not finite"
