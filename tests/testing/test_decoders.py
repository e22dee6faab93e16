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


FEATURES = 5


class Transferring(nn.Module):
    """Weighs the adapters by the similarity of the mean readings."""

    Config = Options

    def __init__(self, config, condition_dim, grid):
        super().__init__()
        self.read = nn.Linear(condition_dim, FEATURES)
        self.register_buffer("known", torch.zeros(0, FEATURES))

    def use_adapters(self, adapters):
        self.adapters = adapters
        self.known = torch.zeros(adapters.shape[0], FEATURES)

    def forward(self, condition, mask):
        return self.mixed(self.coefficients(condition, mask), range(len(self.known)))

    def coefficients(self, condition, mask):
        none = torch.zeros(len(condition), len(self.known), dtype=torch.bool)
        return self.weights(self.features(condition, mask), self.known, none)

    def features(self, condition, mask):
        kept = mask[..., None]
        return self.read((condition * kept).sum((1, 2)) / kept.sum((1, 2)))

    def weights(self, query, known, left_out):
        return (query @ known.T).masked_fill(left_out, -torch.inf).softmax(-1)

    def mixed(self, weights, datasets):
        values = self.adapters.read(datasets, slice(None))
        return torch.einsum("bm,mtd->btd", weights, values)

    def predict(self, condition, mask, support):
        features = self.features(support.condition, support.mask)
        weights = self.weights(self.features(condition, mask), features, support.left_out)
        return self.mixed(weights, support.datasets.tolist())

    @torch.no_grad()
    def fit(self, known):
        self.known.copy_(torch.cat([self.features(*one) for one in known]))


class StartingFromSamples(Transferring):
    """Adds the mean of the examples, which it must have seen by then."""

    def start_from(self, samples):
        self.started = samples[0:1].mean()

    def mixed(self, weights, datasets):
        return super().mixed(weights, datasets) + 0 * self.started


@pytest.mark.parametrize("cls", [Transferring, StartingFromSamples])
def test_one_that_transfers_passes(cls):
    assert issubclass(cls, Transfers)
    assert issubclass(cls, StartsFromSamples) == (cls is StartingFromSamples)
    check_decoder(cls)


def test_an_unfinished_one_learns_what_is_missing():
    ours = {"use_adapters": Transferring.use_adapters, "predict": lambda self: 0}
    with pytest.raises(AssertionError, match="but no fit, coefficients"):
        check_decoder(variant(Decoder, **ours))


def broken(method, change):
    """The method, with its return value changed."""

    def changed(self, *arguments):
        return change(self, getattr(Transferring, method)(self, *arguments))

    return {method: changed}


def over_all(self, query, known, left_out):
    """The left-out adapter keeps its share."""
    return Transferring.weights(self, query, known, torch.zeros_like(left_out))


def over_the_centre(self, query, known, left_out):
    """The left-out prompts still move the centre."""
    centre = known.mean(0)
    return Transferring.weights(self, query - centre, known - centre.square(), left_out)


def with_the_mean(self, weights, datasets):
    """The left-out adapter is still in the mean of all."""
    mean = self.adapters.read(datasets, slice(None)).mean(0)
    return Transferring.mixed(self, weights, datasets) + mean


@pytest.mark.parametrize(
    "attributes, message",
    [
        (broken("predict", lambda self, w: w.flatten(1)), "predict .*: 1 prompts give .2, 192."),
        (broken("predict", lambda self, w: w[:1]), "predict .*: 1 prompts give .1, 24, 8., not .2"),
        (broken("predict", lambda self, w: w / 0), "predict .* not finite"),
        (broken("predict", lambda self, w: w + torch.randn(1)), "predict .* not deterministic"),
        (broken("predict", lambda self, w: w + w.mean()), "predict .* depends on its batch"),
        ({"weights": over_all}, "left_out changes nothing"),
        ({"weights": over_the_centre}, "the prompts of a dataset that is left out change"),
        ({"mixed": with_the_mean}, "the adapter of a dataset that is left out changes"),
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
        (broken("predict", lambda self, w: w.detach()), "carries no gradient"),
        (broken("predict", lambda self, w: w.detach() + 0 * w), "every gradient is zero"),
        (broken("predict", nan_gradient), "gradient of read.weight is not finite"),
        (broken("coefficients", lambda self, c: c[:, :2]), "coefficients|size"),
    ],
)
def test_broken_training(attributes, message):
    with pytest.raises((AssertionError, RuntimeError), match=message):
        check_decoder(variant(Transferring, **attributes))


@torch.no_grad()
def added_up(self, known):
    before = self.known.clone()
    Transferring.fit(self, known)
    self.known += before


@torch.no_grad()
def fitted_into_the_reading(self, known):
    Transferring.fit(self, known)
    self.read.weight *= 2


class FittedBesideItsState(Transferring):
    seen = None

    def fit(self, known):
        self.seen = torch.cat([self.features(*one) for one in known])

    def coefficients(self, condition, mask):
        known = self.known if self.seen is None else self.seen
        none = torch.zeros(len(condition), len(known), dtype=torch.bool)
        return self.weights(self.features(condition, mask), known, none)


@pytest.mark.parametrize(
    "cls, message",
    [
        (variant(Transferring, fit=added_up), "after fit"),
        (variant(Transferring, fit=fitted_into_the_reading), "fit changes what predict"),
        (FittedBesideItsState, "something is not in it"),
    ],
)
def test_broken_fits(cls, message):
    with pytest.raises(AssertionError, match=message):
        check_decoder(cls)
