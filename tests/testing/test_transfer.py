"""What `check_decoder` asks of a decoder that transfers: each bad one breaks one promise."""
# ruff: noqa: ARG005  # a stand-in ignores what the real one would use

import pytest
import torch
from torch import nn

from loragen.core.protocols import StartsFromSamples, Transfers
from loragen.testing import check_decoder

from .stand_ins import Options, variant
from .test_decoders import Decoder

FEATURES, RANK = 5, 3


class Transferring(nn.Module):
    """Reads the mean of a condition and regresses coordinates along random directions."""

    Config = Options

    def __init__(self, config, condition_dim, grid):
        super().__init__()
        self.shape = (grid.tokens, grid.token_dim)
        self.read = nn.Linear(condition_dim, FEATURES)
        self.common = nn.Linear(FEATURES, RANK, bias=False)
        self.directions = nn.Parameter(torch.randn(RANK, grid.tokens * grid.token_dim))

    def forward(self, condition, mask):
        return self.mixed(self.common(self.read(self.pool(condition, mask))))

    def pool(self, condition, mask):
        kept = mask[..., None]
        return (condition * kept).sum((1, 2)) / kept.sum((1, 2))

    def mixed(self, coefficients):
        return (coefficients @ self.directions).view(-1, *self.shape)

    @classmethod
    def can_transfer(cls, config):
        return config.size > 0

    def coordinates(self, samples):
        directions = self.directions.detach()
        return samples[0 : self.shape[0]].flatten(1) @ torch.linalg.pinv(directions)

    def features(self, condition, mask):
        return self.read(self.pool(condition, mask))

    def transferred(self, features, known, coordinates):
        return self.mixed(features @ self.regressed(known, coordinates))

    def regressed(self, known, coordinates):
        return torch.linalg.solve(known.T @ known + torch.eye(FEATURES), known.T @ coordinates)

    @torch.no_grad()
    def settle(self, known, coordinates):
        self.common.weight.copy_(self.regressed(known, coordinates).T)

    def train_transfer_only(self):
        self.requires_grad_(False)
        self.read.requires_grad_(True)


class StartingFromSamples(Transferring):
    """Its directions are the examples themselves, and none before it has seen them."""

    def __init__(self, config, condition_dim, grid):
        super().__init__(config, condition_dim, grid)
        self.started = False

    def start_from(self, samples):
        self.directions.data = samples[0 : self.shape[0]].flatten(1)[:RANK].clone()
        self.started = True

    def coordinates(self, samples):
        assert self.started
        return super().coordinates(samples)


@pytest.mark.parametrize("cls", [Transferring, StartingFromSamples])
def test_one_that_keeps_its_promises_passes(cls):
    assert issubclass(cls, Transfers)
    assert issubclass(cls, StartsFromSamples) == (cls is StartingFromSamples)
    check_decoder(cls)


def test_nothing_is_asked_of_one_that_cannot_with_these_options():
    large = classmethod(lambda cls, config: config.size > 4)
    bad = variant(Transferring, can_transfer=large, settle=lambda self, known, coordinates: None)
    check_decoder(bad, size=4)
    with pytest.raises(AssertionError, match="after settle"):
        check_decoder(bad, size=5)


def test_an_unfinished_one_is_told_what_is_missing():
    unfinished = variant(Decoder, can_transfer=Transferring.can_transfer, features=lambda self: 0)
    missing = "coordinates, transferred, settle, train_transfer_only"
    with pytest.raises(AssertionError, match=f"has can_transfer, but no {missing}$"):
        check_decoder(unfinished)


def broken(method, change):
    """The method, and what becomes of its answer."""

    def changed(self, *arguments):
        return change(self, getattr(Transferring, method)(self, *arguments))

    return {method: changed}


@pytest.mark.parametrize(
    "attributes, message",
    [
        (broken("coordinates", lambda self, c: c[:2]), "samples must be .6, R., not .2, 3."),
        (broken("coordinates", lambda self, c: c[0]), "samples must be .6, R., not .3."),
        (broken("coordinates", lambda self, c: c / 0), "coordinates gives values .* not finite"),
        (broken("coordinates", lambda self, c: c * self.read.weight.sum()), "carries gradients"),
    ],
)
def test_coordinates(attributes, message):
    with pytest.raises(AssertionError, match=message):
        check_decoder(variant(Transferring, **attributes))


def of_all_items(self, features):
    return features + features.mean()


@pytest.mark.parametrize(
    "attributes, message",
    [
        (broken("features", lambda self, f: f[:, None]), "must be .2, F., not .2, 1, 5."),
        (broken("features", lambda self, f: f[:1]), "features: 1 prompts give .1, 5., not .2, 5."),
        ({"features": lambda self, c, mask: c.flatten(1)}, "features: 3 prompts give"),
        (broken("features", lambda self, f: f / 0), "features: .* not finite"),
        (broken("features", lambda self, f: f + torch.randn(1)), "features: not deterministic"),
        ({"features": lambda self, c, mask: self.read(c.mean((1, 2)))}, "masked values change the"),
        (
            {"features": lambda self, c, mask: self.read((c * mask[..., None]).mean((1, 2)))},
            "appended to the condition change the features",
        ),
        (broken("features", of_all_items), "features: an item depends on its batch"),
    ],
)
def test_features(attributes, message):
    with pytest.raises(AssertionError, match=message):
        check_decoder(variant(Transferring, **attributes))


def regressed_on_whitened(self, known, coordinates):
    """Which one dataset alone does not allow."""
    known = (known - known.mean(0)) / known.std(0, correction=0)
    return Transferring.regressed(self, known, coordinates)


@pytest.mark.parametrize(
    "attributes, message",
    [
        (broken("transferred", lambda self, w: w.flatten(1)), "transferred .* gives .2, 192., not"),
        ({"regressed": regressed_on_whitened}, "other datasets: 1. gives .* not finite"),
    ],
)
def test_transferred(attributes, message):
    with pytest.raises(AssertionError, match=message):
        check_decoder(variant(Transferring, **attributes))


def nan_gradient(self, written):
    return written + (0 * self.read.weight).sqrt().sum()


@pytest.mark.parametrize(
    "attributes, message",
    [
        ({"train_transfer_only": lambda self: self.requires_grad_(False)}, "nothing to train"),
        ({"train_transfer_only": lambda self: None}, "no gradient reaches common.weight"),
        (broken("transferred", lambda self, w: w.detach()), "carries no gradient"),
        (broken("transferred", lambda self, w: w.detach() + 0 * w), "every gradient is zero"),
        (broken("transferred", nan_gradient), "gradient of read.weight is not finite"),
    ],
)
def test_what_trains(attributes, message):
    with pytest.raises(AssertionError, match=message):
        check_decoder(variant(Transferring, **attributes))


@torch.no_grad()
def added_up(self, known, coordinates):
    self.common.weight += self.regressed(known, coordinates).T


@torch.no_grad()
def settled_in_the_reading(self, known, coordinates):
    Transferring.settle(self, known, coordinates)
    self.read.weight *= 2


class SettledBesideItsState(Transferring):
    told = None

    def settle(self, known, coordinates):
        self.told = self.regressed(known, coordinates)

    def forward(self, condition, mask):
        if self.told is None:
            return super().forward(condition, mask)
        return self.mixed(self.features(condition, mask) @ self.told)


@pytest.mark.parametrize(
    "cls, message",
    [
        (variant(Transferring, settle=lambda self, known, coordinates: None), "after settle"),
        (variant(Transferring, settle=added_up), "after settle"),
        (variant(Transferring, settle=settled_in_the_reading), "settle changes what transferred"),
        (SettledBesideItsState, "something is not in it"),
    ],
)
def test_settle(cls, message):
    with pytest.raises(AssertionError, match=message):
        check_decoder(cls)
