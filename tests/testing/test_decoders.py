# ruff: noqa: ARG005  # a stand-in ignores what the real one would use

import pytest
import torch
from torch import nn

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
