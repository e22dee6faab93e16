from math import inf, nan
from types import SimpleNamespace

import pytest

from loragen.core.learning import callbacks
from loragen.core.learning.callbacks import Selection, Speed, select_by
from loragen.core.protocols import Metric

LOSS, BEHAVIOUR = Metric("loss", "the error"), Metric("behaviour", "the loss", 0.01)


@pytest.mark.parametrize(
    ("texts", "datasets", "metric", "key"),
    [
        (False, False, LOSS, None),
        (False, False, BEHAVIOUR, None),
        (True, False, LOSS, "val/loss"),
        (True, False, BEHAVIOUR, "val/behaviour"),
        (False, True, LOSS, "val_unseen/loss"),
        (True, True, BEHAVIOUR, "val_unseen/behaviour"),
    ],
)
def test_new_datasets_decide_by_the_metric_of_the_objective(texts, datasets, metric, key):
    selection = select_by(metric, texts, datasets)
    assert selection.metric == key
    assert (key or "the last step") in selection.sentence
    assert selection.tolerance == (metric.tolerance if key else 0)


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


def test_within_the_tolerance_the_later_step_is_kept():
    accepts = Selection("val/x", tolerance=0.01).accepts
    assert accepts(1.009, 1.0)
    assert not accepts(1.011, 1.0)
    assert not accepts(nan, 1.0)


def test_the_label_is_of_the_metrics_last_name():
    assert Selection("val_unseen/behaviour").label(0.12345) == "val_behaviour=0.1235"


def test_pairs_per_second_are_the_mean_over_the_phase(monkeypatch):
    seconds = iter([0, 1, 4, 5, 9, 10])  # the start, then the end of every step
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    speed = Speed()
    assert [speed.after(6, "reconstruction") for _ in range(3)] == [6, 3, 3.6]
    assert [speed.after(4, "behaviour") for _ in range(2)] == [1, 1.6]
