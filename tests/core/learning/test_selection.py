from math import inf, nan

import pytest

from loragen.core.learning.plan import Selection, select_by


@pytest.mark.parametrize(
    ("seen", "unseen", "tried", "metric"),
    [
        (False, False, False, None),
        (False, False, True, None),
        (True, False, False, "val/loss"),
        (True, False, True, "val/behaviour"),
        (False, True, False, "val_unseen/loss"),
        (True, True, True, "val_unseen/behaviour"),
    ],
)
def test_new_datasets_decide_and_what_an_adapter_does(seen, unseen, tried, metric):
    selection = select_by(seen, unseen, tried)
    assert selection.metric == metric
    assert (metric or "the last step") in selection.sentence


def test_the_first_of_two_equals_is_kept_and_nan_is_the_worst():
    accepts = Selection("val/x").accepts
    assert accepts(1.0, None)
    assert accepts(nan, None)
    assert accepts(1.0, 2.0)
    assert not accepts(2.0, 1.0)
    assert not accepts(1.0, 1.0)
    assert not accepts(nan, 1.0)
    assert accepts(1.0, nan)
    assert not accepts(nan, nan)
    assert not accepts(inf, nan)


def test_within_the_tolerance_the_later_step_is_taken():
    accepts = Selection("val/x", tolerance=0.01).accepts
    assert accepts(1.009, 1.0)
    assert not accepts(1.011, 1.0)
    assert not accepts(nan, 1.0)


def test_the_label_is_of_the_metrics_last_name():
    assert Selection("val_unseen/behaviour").label(0.12345) == "val_behaviour=0.1235"
