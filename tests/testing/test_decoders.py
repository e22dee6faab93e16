# ruff: noqa: ARG005  # a stand-in ignores what the real one would use

import pytest
import torch
from torch import nn

from loragen.core.protocols import StartsFromSamples, Transfers
from loragen.testing import check_decoder, grid

from .stand_ins import Options, variant


class Decoder(nn.Module):
    Config = Options

    def __init__(self, config, condition_dim, grid):
        super().__init__()
        self.shape = (grid.tokens, grid.token_dim)
        self.linear = nn.Linear(condition_dim, grid.tokens * grid.token_dim)

    def forward(self, condition, mask):
        return self.linear(self.pool(condition, mask)).view(-1, *self.shape)

    def pool(self, condition, mask):
        kept = mask[..., None]
        return (condition * kept).sum((1, 2)) / kept.sum((1, 2))


def test_one_that_keeps_its_promises_passes():
    check_decoder(Decoder)


def over_the_batch(self, condition, mask):
    pooled = Decoder.pool(self, condition, mask)
    return pooled + pooled.mean()


def initialise_with_unused(self, config, condition_dim, grid):
    Decoder.__init__(self, config, condition_dim, grid)
    self.unused = nn.Linear(1, 1)


def initialise_with_hidden_state(self, config, condition_dim, grid):
    Decoder.__init__(self, config, condition_dim, grid)
    self.hidden = torch.randn(grid.tokens, grid.token_dim)


@pytest.mark.parametrize(
    "attributes, message",
    [
        ({"pool": lambda self, c, mask: c.mean((1, 2))}, "masked values change the output"),
        ({"pool": lambda self, c, mask: (c * mask[..., None]).mean((1, 2))}, "appended"),
        ({"pool": over_the_batch}, "an item depends on its batch"),
        ({"pool": lambda self, c, mask: Decoder.pool(self, c, mask).detach()}, "the condition"),
        ({"pool": lambda self, c, mask: c[:, 0, 0] + torch.randn(1)}, "not deterministic"),
        (
            {"forward": lambda self, c, mask: self.linear(self.pool(c, mask))},
            "output: 1 prompts give",
        ),
        ({"__init__": initialise_with_unused}, "no gradient reaches unused.weight"),
        (
            {
                "__init__": initialise_with_hidden_state,
                "forward": lambda self, c, mask: Decoder.forward(self, c, mask) + self.hidden,
            },
            "something is not in it",
        ),
    ],
)
def test_a_broken_promise_is_named(attributes, message):
    with pytest.raises(AssertionError, match=message):
        check_decoder(variant(Decoder, **attributes))


def test_the_grid_counts_from_zero_without_gaps():
    small = grid(layers=2, modules=3, positions=4, token_dim=5)
    assert (small.tokens, small.token_dim) == (48, 5)
    for axis, size in (("layer", 2), ("module", 3), ("matrix", 2), ("position", 4)):
        assert sorted(set(getattr(small, axis).tolist())) == list(range(size))


FEATURES, COORDINATES = 5, 3


class Transferring(nn.Module):
    """Reads the mean of a condition and regresses coordinates along random directions."""

    Config = Options

    def __init__(self, config, condition_dim, grid):
        super().__init__()
        self.shape = (grid.tokens, grid.token_dim)
        self.read = nn.Linear(condition_dim, FEATURES)
        self.common = nn.Linear(FEATURES, COORDINATES, bias=False)
        self.directions = nn.Parameter(torch.randn(COORDINATES, grid.tokens * grid.token_dim))

    def forward(self, condition, mask):
        return self.mixed(self.common(self.features(condition, mask)))

    def features(self, condition, mask):
        kept = mask[..., None]
        return self.read((condition * kept).sum((1, 2)) / kept.sum((1, 2)))

    def mixed(self, coefficients):
        return (coefficients @ self.directions).view(-1, *self.shape)

    @classmethod
    def transfer_parameters(cls, config):
        return ["read."] if config.size > 0 else None

    def coordinates(self, samples):
        directions = self.directions.detach()
        return samples[0 : self.shape[0]].flatten(1) @ torch.linalg.pinv(directions)

    def predict(self, condition, mask, known, known_mask, targets):
        weights = self.regressed(self.features(known, known_mask), targets)
        return self.mixed(self.features(condition, mask) @ weights)

    def regressed(self, known, targets):
        return torch.linalg.solve(known.T @ known + torch.eye(FEATURES), known.T @ targets)

    @torch.no_grad()
    def fit(self, known, targets):
        features = torch.cat([self.features(condition, mask) for condition, mask in known])
        self.common.weight.copy_(self.regressed(features, targets).T)


class StartingFromSamples(Transferring):
    """Its directions are the examples themselves, and missing before it has seen them."""

    def __init__(self, config, condition_dim, grid):
        super().__init__(config, condition_dim, grid)
        self.started = False

    def start_from(self, samples):
        self.directions.data = samples[0 : self.shape[0]].flatten(1)[:COORDINATES].clone()
        self.started = True

    def coordinates(self, samples):
        assert self.started
        return super().coordinates(samples)


@pytest.mark.parametrize("cls", [Transferring, StartingFromSamples])
def test_one_that_transfers_passes(cls):
    assert issubclass(cls, Transfers)
    assert issubclass(cls, StartsFromSamples) == (cls is StartingFromSamples)
    check_decoder(cls)


def test_nothing_is_checked_of_one_that_cannot_with_these_options():
    large = classmethod(lambda cls, config: ["read."] if config.size > 4 else None)
    bad = variant(Transferring, transfer_parameters=large, fit=lambda self, known, targets: None)
    check_decoder(bad, size=4)
    with pytest.raises(AssertionError, match="after fit"):
        check_decoder(bad, size=5)


def test_an_unfinished_one_learns_what_is_missing():
    ours = {"transfer_parameters": Transferring.transfer_parameters, "predict": lambda self: 0}
    with pytest.raises(AssertionError, match="but no coordinates, fit"):
        check_decoder(variant(Decoder, **ours))


def broken(method, change):
    """The method, with its return value changed."""

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
def test_broken_coordinates(attributes, message):
    with pytest.raises(AssertionError, match=message):
        check_decoder(variant(Transferring, **attributes))


def regressed_on_whitened(self, known, targets):
    """Which is not defined for a single dataset."""
    known = (known - known.mean(0)) / known.std(0, correction=0)
    return Transferring.regressed(self, known, targets)


@pytest.mark.parametrize(
    "attributes, message",
    [
        (broken("predict", lambda self, w: w.flatten(1)), "predict .*: 1 prompts give .2, 192."),
        (broken("predict", lambda self, w: w[:1]), "predict .*: 1 prompts give .1, 24, 8., not .2"),
        (broken("predict", lambda self, w: w / 0), "predict .* not finite"),
        (broken("predict", lambda self, w: w + torch.randn(1)), "predict .* not deterministic"),
        (broken("predict", lambda self, w: w + w.mean()), "predict .* depends on its batch"),
        ({"features": lambda self, c, mask: self.read(c.mean((1, 2)))}, "masked values change the"),
        ({"regressed": regressed_on_whitened}, "predict .other datasets: 1.* not finite"),
    ],
)
def test_broken_predictions(attributes, message):
    with pytest.raises(AssertionError, match=message):
        check_decoder(variant(Transferring, **attributes))


def nan_gradient(self, predicted):
    return predicted + (0 * self.read.weight).sqrt().sum()


@pytest.mark.parametrize(
    "attributes, message",
    [
        ({"transfer_parameters": classmethod(lambda cls, config: ["x"])}, "no parameter's name"),
        ({"transfer_parameters": classmethod(lambda cls, config: [""])}, "reaches common.weight"),
        (broken("predict", lambda self, w: w.detach()), "carries no gradient"),
        (broken("predict", lambda self, w: w.detach() + 0 * w), "every gradient is zero"),
        (broken("predict", nan_gradient), "gradient of read.weight is not finite"),
    ],
)
def test_broken_training(attributes, message):
    with pytest.raises(AssertionError, match=message):
        check_decoder(variant(Transferring, **attributes))


@torch.no_grad()
def added_up(self, known, targets):
    before = self.common.weight.clone()
    Transferring.fit(self, known, targets)
    self.common.weight += before


@torch.no_grad()
def fitted_into_the_reading(self, known, targets):
    Transferring.fit(self, known, targets)
    self.read.weight *= 2


class FittedBesideItsState(Transferring):
    weights = None

    def fit(self, known, targets):
        features = torch.cat([self.features(condition, mask) for condition, mask in known])
        self.weights = self.regressed(features, targets)

    def forward(self, condition, mask):
        if self.weights is None:
            return super().forward(condition, mask)
        return self.mixed(self.features(condition, mask) @ self.weights)


@pytest.mark.parametrize(
    "cls, message",
    [
        (variant(Transferring, fit=lambda self, known, targets: None), "after fit"),
        (variant(Transferring, fit=added_up), "after fit"),
        (variant(Transferring, fit=fitted_into_the_reading), "fit changes what predict"),
        (FittedBesideItsState, "something is not in it"),
    ],
)
def test_broken_fits(cls, message):
    with pytest.raises(AssertionError, match=message):
        check_decoder(cls)
