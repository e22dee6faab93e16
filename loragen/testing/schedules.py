"""The promise of a schedule."""

import math
import pickle
from typing import Any

from loragen.core.protocols import Rate
from loragen.testing._common import validated_options


def check_schedule(cls: Any, **options: Any) -> None:
    """A schedule is a pure function of (step, total steps).

    It gives the same answer twice and from a fresh instance, so that a resumed run follows the same
    rates; every rate of steps 1 to total is a positive finite number, in runs of one step too;
    stages are counted from 1 and never go back; the answer is plain numbers, fit for a checkpoint.
    """
    config = validated_options(cls, options)
    schedule = cls(config)
    for total in (1, 2, 3, 10, 125, 1000):
        stage = 1
        for step in range(1, total + 1):
            where = f"{cls.__name__}(step={step}, total_steps={total})"
            rate = schedule(step, total)
            _check_rate(rate, where)
            assert rate.stage >= stage, f"{where} goes back from stage {stage} to {rate.stage}"
            stage = rate.stage
            assert schedule(step, total) == rate, f"{where} answers differently the second time"
            assert cls(config)(step, total) == rate, f"{where} differs on a fresh instance"


def _check_rate(rate: Rate, where: str) -> None:
    learning_rate, stage = rate.learning_rate, rate.stage
    plain = type(learning_rate) in (int, float) and type(stage) is int
    assert plain, f"{where} must give plain numbers, not {rate!r}"
    assert math.isfinite(learning_rate) and learning_rate > 0, f"{where} gives {learning_rate}"
    assert stage >= 1, f"{where} is in stage {stage}; stages are counted from 1"
    assert pickle.loads(pickle.dumps(rate)) == rate, f"{where} does not survive pickling"
