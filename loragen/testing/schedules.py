"""The contract of a schedule."""

import math
import pickle
from typing import Any

from loragen.testing._common import validated_options


def check_schedule(cls: Any, **options: Any) -> None:
    """Checks that a schedule is a pure function of (step, total steps).

    A second call and a new instance return the same rate, so that a resumed run has the same rates.
    For runs of 1 to 1,000 steps, every learning rate is positive and finite, and stages are counted
    from 1 and never decrease. A rate holds plain numbers and can be pickled into a checkpoint.
    """
    config = validated_options(cls, options)
    schedule = cls(config)
    for total in (1, 2, 3, 10, 125, 1000):
        stage = 1
        for step in range(1, total + 1):
            where = f"{cls.__name__}(step={step}, total_steps={total})"
            rate = schedule(step, total)
            has_both = hasattr(rate, "learning_rate") and hasattr(rate, "stage")
            assert has_both, f"{where} must give a Rate(learning_rate, stage), not {rate!r}"
            value = rate.learning_rate
            plain = type(value) in (int, float) and type(rate.stage) is int
            assert plain, f"{where} must give plain numbers, not {rate!r}"
            assert math.isfinite(value) and value > 0, f"{where} gives {value}"
            assert rate.stage >= 1, f"{where} gives stage {rate.stage}; stages count from 1"
            assert pickle.loads(pickle.dumps(rate)) == rate, f"{where} does not survive pickling"
            assert rate.stage >= stage, f"{where} goes back from stage {stage} to {rate.stage}"
            stage = rate.stage
            assert schedule(step, total) == rate, f"{where} differs when called again"
            assert cls(config)(step, total) == rate, f"{where} differs on a fresh instance"
