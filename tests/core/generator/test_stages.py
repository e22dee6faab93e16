import math

import pytest
import torch

from loragen.core.errors import UsageError
from loragen.core.generator.layout import Layout
from loragen.core.generator.network import new_network
from loragen.core.generator.stages import anatomy

LAYOUT = Layout.of(
    {
        f"base_model.model.layers.{layer}.{module}.lora_{which}.weight": torch.zeros(shape)
        for layer in range(3)
        for module in ("q", "v")
        for which, shape in (("A", (2, 9)), ("B", (7, 2)))
    },
    token_dim=8,
)
CONDITION = (4, 2, 6)  # prompts, positions, dim
SMALL = {"blocks": 2, "hidden_dim": 12, "rank": 4}
GEOMETRIES = {
    "derived": (SMALL, ["read", "expand", "blocks.0", "blocks.1", "steer", "project"]),
    "derived, frozen": ({**SMALL, "train_directions": False}, None),
    "paper": ({"shapes": [(4, 2, 6), (9, 3, 4), (30, 4, 4)]}, ["fit", "blocks.0", "blocks.1"]),
}


def measured(options):
    """Shapes and sizes of a decoder that is really built and really run."""
    network = new_network("hyperconv", options, CONDITION[-1], LAYOUT).eval()
    body, found = network.decoder.body, {}
    for name, module in body.named_modules():
        module.register_forward_hook(
            lambda module, _, output, name=name: found.__setitem__(
                name, (tuple(output.shape[1:]), sum(p.numel() for p in module.parameters()))
            )
        )
    with torch.inference_mode():
        mask = torch.ones(1, *CONDITION[:2], dtype=torch.bool)
        output = network(torch.randn(1, *CONDITION), mask)
    return network, found, output


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_it_is_that_of_a_decoder_really_built(geometry):
    options, names = GEOMETRIES[geometry]
    network, found, output = measured(options)
    told = anatomy("hyperconv", options, LAYOUT, CONDITION)
    assert names is None or [stage.name for stage in told.stages] == names
    for stage in told.stages:
        assert (stage.shape, stage.parameters) == found[stage.name], stage.name
        assert stage.bytes == 4 * math.prod(stage.shape)
    assert told.stages[-1].shape[-1] in (LAYOUT.token_dim, 4)  # tokens, or the paper's last map
    assert output.shape == (1, LAYOUT.tokens, LAYOUT.token_dim)
    weights = list(network.parameters())
    assert told.parameters == sum(p.numel() for p in weights)
    assert told.parameters == sum(stage.parameters for stage in told.stages)
    assert told.trained == sum(p.numel() for p in weights if p.requires_grad)
    assert told.weights_bytes == 4 * told.parameters
    assert told.training_bytes == 4 * (told.parameters + 3 * told.trained)


def test_frozen_directions_need_no_moments():
    trained, frozen = (
        anatomy("hyperconv", GEOMETRIES[name][0], LAYOUT, CONDITION)
        for name in ("derived", "derived, frozen")
    )
    directions = LAYOUT.tokens * LAYOUT.token_dim * SMALL["rank"]
    assert trained.parameters == frozen.parameters
    assert trained.trained - frozen.trained == directions


def test_nothing_is_allocated_whatever_the_size():
    shape = (64, 1_000_000)
    large = Layout.of({"m.layers.0.q.lora_A.weight": torch.empty(shape, device="meta")}, 384)
    told = anatomy("hyperconv", {"rank": 100, "blocks": 1}, large, CONDITION)
    assert told.parameters > 6_400_000_000
    assert torch.get_default_device() == torch.device("cpu")


def test_the_random_state_is_left_alone():
    before = torch.get_rng_state()
    anatomy("hyperconv", SMALL, LAYOUT, CONDITION)
    assert torch.get_rng_state().equal(before)


def test_options_that_do_not_suit_the_layout_are_refused():
    with pytest.raises(UsageError, match="decoder hyperconv: the last map"):
        anatomy("hyperconv", {"shapes": [(4, 2, 6), (1, 1, 1)]}, LAYOUT, CONDITION)
