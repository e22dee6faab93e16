import pytest
import torch

from loragen.core.adapter.layout import Layout
from loragen.core.errors import UsageError
from loragen.core.generator.network import anatomy, new_network

CONDITION = (4, 2, 6)


@pytest.fixture
def layout():
    """Two layers of one module: 4 cells of 3 tokens."""
    shapes = {"lora_A": (2, 12), "lora_B": (12, 2)}
    return Layout.of(
        {
            f"base_model.model.layers.{layer}.q_proj.{matrix}.weight": torch.empty(shape)
            for layer in range(2)
            for matrix, shape in shapes.items()
        },
        token_dim=8,
    )


@pytest.mark.parametrize(
    ("options", "names", "shapes"),
    [
        (
            {"blocks": 2, "hidden_dim": 10, "rank": 3},
            ["read", "expand", "blocks.0", "blocks.1", "steer", "project"],
            [(20,), (2, 2, 10), (2, 2, 10), (2, 2, 10), (2, 2, 3), (12, 8)],
        ),
        (
            {"shapes": [(3, 2, 4), (6, 3, 4), (12, 2, 4)]},
            ["fit", "blocks.0", "blocks.1"],
            [(3, 2, 4), (6, 3, 4), (12, 2, 4)],
        ),
    ],
)
def test_it_is_what_the_decoder_is(layout, options, names, shapes):
    found = anatomy("hyperconv", options, layout, CONDITION)
    assert [stage.name for stage in found.stages] == names
    assert [stage.shape for stage in found.stages] == shapes
    real = new_network("hyperconv", options, CONDITION[-1], layout)
    assert found.parameters == sum(p.numel() for p in real.parameters())
    assert sum(stage.parameters for stage in found.stages) == found.parameters
    assert found.weights_bytes == 4 * found.parameters
    assert found.training_bytes == 4 * found.parameters + 12 * found.trained
    assert found.pair_bytes == 4 * sum(torch.Size(shape).numel() for shape in shapes)


def test_what_stays_as_it_is_needs_no_moments(layout):
    found = anatomy("hyperconv", {"rank": 3, "train_directions": False}, layout, CONDITION)
    assert found.parameters - found.trained == 12 * 3 * 8 + 1  # and the penalty of a transfer
    assert "stay (train_directions: false)" in found.choices[-1]


def test_to_transfer_the_reading_alone_trains(layout):
    found = anatomy("hyperconv", {"rank": 3}, layout, CONDITION, transfers=True)
    (read,) = [stage for stage in found.stages if stage.name == "read"]
    assert found.trained == read.parameters + 1  # the penalty
    assert found.choices[-1].endswith("the reading alone trains")


def test_it_says_what_it_has_settled_and_why(layout):
    found = anatomy("hyperconv", {"max_parameters": 12 * 8 * 5}, layout, CONDITION)
    assert found.choices[:2] == [
        "feature map: 2 layers x 2 kinds of matrix x 384 channels, from the adapter and hidden_dim",
        "5 directions of 96 values: max_parameters 480 over that, but 4 to 32 (rank: auto)",
    ]
    asked = anatomy("hyperconv", {"rank": 3}, layout, CONDITION)
    assert asked.choices[1] == "3 directions of 96 values: as configured (rank)"


def test_maps_that_are_too_small_are_a_usage_error(layout):
    with pytest.raises(UsageError, match="decoder hyperconv: the last map"):
        anatomy("hyperconv", {"shapes": [(3, 2, 4), (5, 2, 4)]}, layout, CONDITION)


def test_nothing_is_allocated_whatever_the_size():
    shape = (64, 1_000_000)
    large = Layout.of({"m.layers.0.q.lora_A.weight": torch.empty(shape, device="meta")}, 384)
    told = anatomy("hyperconv", {"rank": 100, "blocks": 1}, large, CONDITION)
    assert told.parameters > 6_400_000_000
    assert torch.get_default_device() == torch.device("cpu")


def test_the_random_state_is_left_alone(layout):
    before = torch.get_rng_state()
    anatomy("hyperconv", {"rank": 3}, layout, CONDITION)
    assert torch.get_rng_state().equal(before)
