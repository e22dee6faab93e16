"""The contract of a decoder. Imports torch only when a check is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from loragen.core.protocols import StartsFromSamples, SupportSet, TokenGrid, Transfers
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

    A decoder that combines collected adapters has to keep the promises of `Transfers` too; it is
    fitted to a few before the checks above. For a support set of one dataset or of several,
    `predict` keeps the promises of the output, and its gradients reach every trainable parameter.
    What is left out changes nothing, neither its adapter nor its prompts. After `fit`, which
    forgets earlier calls, the decoder itself gives what `predict` gave and still gives, and so does
    a decoder with the loaded state dict; its coefficients are finite `[batch, N]`.

    Raises AssertionError naming the promise that is broken.
    """
    import torch

    torch.manual_seed(0)
    config = validated_options(cls, options)
    transfers = hasattr(cls, "use_adapters")
    if transfers:
        promised = [name for name in vars(Transfers) if not name.startswith("_")]
        missing = [name for name in promised if not hasattr(cls, name)]
        assert not missing, f"{cls.__name__} has use_adapters, but no {', '.join(missing)}"
    decoder, fresh = (_ready(cls, config, ExampleAdapters()) for _ in range(2))
    disturb(decoder.parameters())
    if transfers:
        decoder.fit(_one_by_one(*example_conditions(DATASETS, 3, seed=1)))
    _check_output(decoder, "output")
    _check_state_dict(decoder, fresh)
    trained = trainable(decoder)
    assert trained, "there is no trainable parameter"
    condition, mask = example_conditions(2, 3)
    output = decoder.train()(condition.requires_grad_(), mask)
    _check_gradients(output, "output", trained)
    assert condition.grad is not None and condition.grad.any(), "the output ignores the condition"
    assert condition.grad.isfinite().all(), "the gradient of the condition is not finite"
    if transfers:
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


class ExampleAdapters:
    """One adapter of each dataset, with the protocols `Samples` and `CollectedAdapters`."""

    def __init__(self, noisy: Sequence[int] = ()) -> None:
        """The adapters of the datasets in `noisy` are others than in any other instance."""
        import torch

        generator = torch.Generator().manual_seed(0)
        self.shape = (DATASETS, grid().tokens, grid().token_dim)
        self._values = torch.randn(self.shape, generator=generator)
        for index in noisy:
            self._values[index] = torch.randn(self.shape[1:])

    def __getitem__(self, tokens: slice) -> Tensor:
        return self._values[:, tokens]

    def read(self, datasets: Sequence[int], tokens: slice) -> Tensor:
        return self._values[list(datasets), tokens]


def _ready(cls: Any, config: Any, adapters: ExampleAdapters) -> Any:
    """Returns a decoder as a training prepares it before the first step."""
    decoder = built(cls, config, CONDITION_DIM, grid())
    if isinstance(decoder, Transfers):
        decoder.use_adapters(adapters)
    if isinstance(decoder, StartsFromSamples):
        decoder.start_from(adapters)
    return decoder


def _one_by_one(condition: Tensor, mask: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return ((condition[i : i + 1], mask[i : i + 1]) for i in range(len(condition)))


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
    """Calls the decoder in the order of a training."""
    import torch

    decoder = _ready(cls, config, ExampleAdapters())
    disturb(decoder.parameters())
    known, known_mask = example_conditions(DATASETS, 3, seed=1)

    def predict(
        condition: Tensor,
        mask: Tensor,
        by: Any = decoder,
        others: Tensor = known,
        datasets: int = DATASETS,
        without: int | None = None,
    ) -> Tensor:
        left_out = torch.zeros(len(condition), datasets, dtype=torch.bool)
        if without is not None:
            left_out[:, without] = True
        support = torch.arange(datasets)
        given = SupportSet(others[:datasets], known_mask[:datasets], support, left_out)
        predicted: Tensor = by.predict(condition, mask, given)
        return predicted

    for datasets in (1, DATASETS):
        decode = partial(predict, datasets=datasets)
        _check_output(decode, f"predict (support: {datasets} datasets)")
    condition, mask = example_conditions(3, 3)

    left_out = predict(condition, mask, without=2)
    assert not left_out.equal(predict(condition, mask)), "left_out changes nothing in predict"
    other = _ready(cls, config, ExampleAdapters(noisy=[2]))
    other.load_state_dict(decoder.state_dict())
    assert predict(condition, mask, by=other, without=2).equal(left_out), (
        "the adapter of a dataset that is left out changes what predict gives"
    )
    noisy = known.clone()
    noisy[2] = torch.randn_like(noisy[2])
    assert predict(condition, mask, others=noisy, without=2).equal(left_out), (
        "the prompts of a dataset that is left out change what predict gives"
    )

    decoder.train()
    _check_gradients(predict(*example_conditions(2, 3)), "predict", trainable(decoder))
    decoder.eval()

    with torch.no_grad():
        expected = predict(condition, mask)
        for conditions in (-known, known):  # a training fits the decoder many times
            decoder.fit(_one_by_one(conditions, known_mask))
        still, decoded = predict(condition, mask), decoder(condition, mask)
        shares = decoder.coefficients(condition, mask)
    tolerance = FIT_TOLERANCE * float(expected.abs().max())
    assert (off := largest_difference(still, expected)) <= tolerance, (
        f"fit changes what predict gives, and so what is trained: by {off:.1e}"
    )
    assert (off := largest_difference(decoded, expected)) <= tolerance, (
        f"after fit the decoder does not give what predict gave: off by {off:.1e}"
    )
    assert list(shares.shape) == [len(condition), DATASETS] and shares.isfinite().all(), (
        f"coefficients must be finite [{len(condition)}, {DATASETS}], not {list(shares.shape)}"
    )
    _check_state_dict(decoder, _ready(cls, config, ExampleAdapters()))
