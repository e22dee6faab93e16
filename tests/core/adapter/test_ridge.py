"""Kernel ridge regression: against its definition, refitted for every dataset that is left out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loragen.core.adapter.ridge import PENALTIES, KernelRidge, fit_ridge, leave_one_out_errors

counts = st.integers(2, 7)
seeds = st.integers(0, 10**6)
penalties = st.floats(1e-3, 1e3)


def data(count, seed, dim=3, values=4):
    """Features ``[count, dim]`` and targets ``[count, values]``, neither of them centred."""
    random = np.random.default_rng(seed)
    return random.normal(2, 1, (count, dim)), random.normal(-5, 1, (count, values))


@given(counts, seeds, penalties)
def test_a_prediction_is_that_of_a_ridge_regression_with_a_free_intercept(count, seed, penalty):
    """The normal equations of [1, x], with no penalty on the intercept."""
    features, targets = data(count, seed)
    x = np.column_stack([np.ones(count), features])
    free = np.diag([0.0, *[penalty] * features.shape[1]])
    weights = np.linalg.solve(x.T @ x + free, x.T @ targets)
    asked = features.mean(0) + 0.7
    found = KernelRidge(features, penalty).coefficients(asked)
    assert found.sum() == pytest.approx(1)
    assert found @ targets == pytest.approx(np.array([1, *asked]) @ weights, abs=1e-6)


@given(counts, seeds, penalties)
def test_leave_one_out_is_the_error_of_regressions_that_never_saw_the_one_left_out(
    count, seed, penalty
):
    features, targets = data(count, seed)
    squares = []
    for out in range(count):
        kept = [index for index in range(count) if index != out]
        weights = KernelRidge(features[kept], penalty).coefficients(features[out])
        squares.append(np.square(targets[out] - weights @ targets[kept]).sum())
    (found,) = leave_one_out_errors(features, targets @ targets.T, [penalty])
    assert found == pytest.approx(np.mean(squares), rel=1e-6)


@given(counts, seeds)
def test_a_huge_penalty_gives_the_mean(count, seed):
    features, targets = data(count, seed)
    asked = features[0] + 10
    for penalty in (1e15, float("inf")):
        found = KernelRidge(features, penalty).coefficients(asked) @ targets
        assert found == pytest.approx(targets.mean(0), abs=1e-6)


@given(counts, seeds, st.floats(-1e3, 1e3))
def test_an_offset_of_all_targets_changes_no_error(count, seed, offset):
    features, targets = data(count, seed)
    moved = targets + offset
    tried = [0.1, 10.0, float("inf")]
    one, other = (leave_one_out_errors(features, y @ y.T, tried) for y in (targets, moved))
    assert one == pytest.approx(other, rel=1e-4, abs=1e-6)


def test_what_features_do_not_tell_is_predicted_by_the_mean():
    random = np.random.default_rng(3)
    features, targets = random.normal(size=(40, 20)), random.normal(size=(40, 500))
    assert fit_ridge(features, targets @ targets.T).penalty > 20 * max(
        penalty for penalty in PENALTIES if penalty < 10
    )


def test_what_features_tell_is_predicted_with_a_small_penalty():
    random = np.random.default_rng(3)
    features = random.normal(size=(40, 5))
    targets = features @ random.normal(size=(5, 500)) + 7
    ridge = fit_ridge(features, targets @ targets.T)
    asked = random.normal(size=5)
    weights = np.linalg.lstsq(np.column_stack([np.ones(40), features]), targets, rcond=None)[0]
    expected = np.array([1, *asked]) @ weights
    assert ridge.coefficients(asked) @ targets == pytest.approx(expected, rel=0.05)


def test_equal_features_tell_nothing():
    targets = np.eye(3)
    ridge = fit_ridge(np.ones((3, 2)), targets @ targets.T)
    assert ridge.coefficients(np.ones(2)) == pytest.approx([1 / 3] * 3)
