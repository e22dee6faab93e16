"""The promise of a decoder that writes adapters from what is known of other datasets alone.

It is asked what a training asks it, in that order: it starts from examples, leaves gradients to
what transfers, tells the examples' coordinates, and is settled before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loragen.core.protocols import StartsFromSamples, Transfers
from loragen.testing._common import built, distance, disturb, trainable
from loragen.testing._decoding import (
    CONDITION_DIM,
    check_answer,
    check_gradients,
    check_state_dict,
    conditions,
    grid,
)

if TYPE_CHECKING:
    from torch import Tensor

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
    _check_training(decoder, coordinates)
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
    shape = tuple(decoder.features(*conditions(2, 1)).shape)
    assert len(shape) == 2, f"features of 2 conditions must be [2, F], not {list(shape)}"
    check_answer(decoder.features, "features", (2, shape[1]))


def _check_transferred(decoder: Any, coordinates: Tensor) -> None:
    expected = (2, grid().tokens, grid().token_dim)
    for datasets in (1, DATASETS):
        written = _transferred(decoder, *conditions(2, 3), coordinates[:datasets])
        shape = tuple(written.shape)
        where = f"transferred (other datasets: {datasets})"
        assert shape == expected, f"{where} gives {shape}, not {expected}"
        assert written.isfinite().all(), f"{where} gives values that are not finite"


def _check_training(decoder: Any, coordinates: Tensor) -> None:
    written = _transferred(decoder.train(), *conditions(2, 3), coordinates)
    check_gradients(written, "transferred, after train_transfer_only", trainable(decoder))


def _check_settled(decoder: Any, coordinates: Tensor) -> None:
    import torch

    condition, mask = conditions(3, 3)
    with torch.no_grad():
        expected = _transferred(decoder, condition, mask, coordinates)
        known = _known(decoder)
        for told in (-coordinates, coordinates):  # a training settles time and again
            decoder.settle(known, told)
        still = _transferred(decoder, condition, mask, coordinates)
        written = decoder(condition, mask)
    tolerance = SETTLED * float(expected.abs().max())
    assert (off := distance(still, expected)) <= tolerance, (
        f"settle changes what transferred gives, and so what is trained: by {off:.1e}"
    )
    assert (off := distance(written, expected)) <= tolerance, (
        f"after settle the decoder does not write as transferred did: off by {off:.1e}"
    )


def _transferred(decoder: Any, condition: Tensor, mask: Tensor, coordinates: Tensor) -> Tensor:
    """From as many datasets as there are coordinates."""
    known = _known(decoder)[: len(coordinates)]
    written: Tensor = decoder.transferred(decoder.features(condition, mask), known, coordinates)
    return written


def _known(decoder: Any) -> Tensor:
    """The features of every dataset, ``[datasets, F]``."""
    features: Tensor = decoder.features(*conditions(DATASETS, 3, seed=1))
    return features
