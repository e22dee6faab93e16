from itertools import pairwise

import pytest

from loragen.core.plugins import create, find
from loragen.testing import check_schedule


@pytest.mark.parametrize(
    "name, options",
    [
        ("constant", {}),
        ("constant", {"learning_rate": 3e-4}),
        ("two-stage", {}),
        ("two-stage", {"stage1_steps": 0}),
        ("two-stage", {"stage1_steps": 5000}),
        ("linear", {}),
        ("linear", {"warmup_ratio": 0.0}),
        ("linear", {"warmup_ratio": 0.5, "floor": 0.1}),
        ("cosine", {}),
        ("cosine", {"warmup_ratio": 0.0}),
        ("cosine", {"warmup_ratio": 0.5, "floor": 0.1}),
    ],
)
def test_contract(name, options):
    check_schedule(find("schedule", name), **options)


def test_constant_is_constant():
    schedule = create("schedule", "constant", {"learning_rate": 0.5})
    assert {schedule(step, 10) for step in range(1, 11)} == {(0.5, 1)}


def test_two_stage_changes_at_step_76():
    schedule = create("schedule", "two-stage", {})
    assert schedule(1, 125) == (1e-4, 1)
    assert schedule(75, 125) == (1e-4, 1)
    assert schedule(76, 125) == (1e-5, 2)
    assert schedule(125, 125) == (1e-5, 2)


def test_linear_rises_to_the_peak_and_falls_straight_to_the_floor():
    options = {"learning_rate": 1.0, "warmup_ratio": 0.1, "floor": 0.1}
    schedule = create("schedule", "linear", options)
    rates = [schedule(step, 100).learning_rate for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert rates[10:] == pytest.approx([1 - 0.01 * step for step in range(90)])


def test_cosine_rises_to_the_peak_and_falls_to_the_floor():
    options = {"learning_rate": 1.0, "warmup_ratio": 0.1, "floor": 0.2}
    schedule = create("schedule", "cosine", options)
    rates = [schedule(step, 100).learning_rate for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert max(rates) == pytest.approx(1.0)
    assert all(a >= b for a, b in pairwise(rates[9:]))
    assert rates[-1] == pytest.approx(0.2, abs=0.01)
