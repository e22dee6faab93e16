import pytest

from loragen.core.config import GenTrainConfig
from loragen.core.learning.plan import step_plan

BOTH = "reconstruction-then-behaviour"


def planned(objective, per_epoch=5, schedule="cosine", **sections):
    training = {"objective": objective, "max_epochs": 4, **sections.pop("training", {})}
    config = GenTrainConfig(training=training, schedule={"name": schedule}, **sections)
    return step_plan(config, per_epoch)


@pytest.mark.parametrize(
    ("objective", "told"),
    [
        ("reconstruction", "20 steps of reconstruction"),
        ("behaviour", "400 steps of behaviour"),
        (BOTH, "20 steps of reconstruction, then 400 steps of behaviour"),
    ],
)
def test_epochs_make_the_reconstruction_and_steps_the_behaviour(objective, told):
    assert str(planned(objective).phases) == told


@pytest.mark.parametrize(
    ("sections", "steps"),
    [
        ({"training": {"max_steps": 7}}, [7, 9]),
        ({"training": {"max_steps": 99}}, [20, 9]),
        ({"trainer": {"limit_train_batches": 6}}, [6, 6]),
        ({"trainer": {"limit_train_batches": 6, "accumulate_grad_batches": 4}}, [2, 2]),
        ({"trainer": {"limit_train_batches": 0.25}}, [5, 3]),
    ],
)
def test_what_ends_a_phase_earlier(sections, steps):
    plan = planned(BOTH, behaviour={"max_steps": 9}, **sections)
    assert [phase.steps for phase in plan.phases.phases] == steps
    assert plan.total == sum(steps)


def test_every_phase_has_a_schedule_of_its_own():
    plan = planned(
        BOTH,
        training={"learning_rate": 1e-3},
        behaviour={"max_steps": 20, "learning_rate": 1e-4},
    )
    rates = [plan.rate(step).learning_rate for step in range(1, 41)]
    assert rates[20:] == pytest.approx([rate / 10 for rate in rates[:20]])
    assert max(rates[:20]) == pytest.approx(1e-3, rel=0.1)
    assert plan.rate(41) == plan.rate(40)  # which LambdaLR asks for


def test_epochs_are_told_of_every_step():
    plan = planned(BOTH)
    assert [plan.epochs(step) for step in (5, 20, 40)] == [1.0, 4.0, 8.0]
