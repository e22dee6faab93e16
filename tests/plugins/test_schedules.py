from itertools import pairwise

import pytest
import torch
from transformers import get_scheduler

from loragen.core.data.dataset import Dataset
from loragen.core.errors import PluginError
from loragen.core.learning.train import train
from loragen.core.lora.train import train_adapter
from loragen.core.plugins import create, find
from loragen.core.progress import Silent
from loragen.core.run.metrics import read_metrics
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
        ("constant", {"warmup_ratio": 0.9}),
        ("two-stage", {"warmup_ratio": 0.9}),
        ("polynomial", {}),
        ("polynomial", {"power": 10, "warmup_ratio": 0.0}),
        ("wsd", {}),
        ("wsd", {"decay_ratio": 1.0, "warmup_ratio": 0.0}),
        ("wsd", {"decay_ratio": 0.0, "floor": 0.1}),
        ("wsd", {"decay": "1-sqrt", "warmup_ratio": 0.5, "decay_ratio": 0.5}),
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


THEIRS = {
    "constant": ("constant_with_warmup", {}, {}),
    "linear": ("linear", {}, {}),
    "cosine": ("cosine", {}, {}),
    "cosine with a floor": ("cosine_with_min_lr", {"floor": 0.1}, {"min_lr_rate": 0.1}),
    "polynomial": ("polynomial", {"floor": 1e-4}, {"lr_end": 1e-7}),
    "polynomial of power 2": (
        "polynomial",
        {"floor": 0.1, "power": 2},
        {"lr_end": 1e-4, "power": 2},
    ),
    "wsd": ("warmup_stable_decay", {}, {"num_decay_steps": 25}),
    "wsd, linear": (
        "warmup_stable_decay",
        {"decay": "linear", "floor": 0.1},
        {"num_decay_steps": 25, "decay_type": "linear", "min_lr_ratio": 0.1},
    ),
    "wsd, 1-sqrt": (
        "warmup_stable_decay",
        {"decay": "1-sqrt"},
        {"num_decay_steps": 25, "decay_type": "1-sqrt"},
    ),
}


@pytest.mark.parametrize("warmup_ratio", [0.0, 0.08])
@pytest.mark.parametrize("case", THEIRS)
def test_after_the_warm_up_the_rates_are_those_of_transformers(case, warmup_ratio):
    """Theirs counts from 0: its step k is rate k of a list that starts with 0 in a warm-up."""
    theirs, options, their_options = THEIRS[case]
    name = case.partition(" ")[0].rstrip(",")
    options = {"learning_rate": 1e-3, "warmup_ratio": warmup_ratio, **options}
    schedule, steps, warmup = create("schedule", name, options), 125, round(125 * warmup_ratio)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler = get_scheduler(
        theirs, optimizer, warmup, steps, scheduler_specific_kwargs=their_options
    )
    wanted = []
    for _ in range(steps):
        wanted += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    rates = [schedule(step, steps).learning_rate for step in range(1, steps + 1)]
    assert rates[warmup:] == pytest.approx(wanted[warmup:], rel=1e-12)
    assert rates[:warmup] == pytest.approx([1e-3 * k / warmup for k in range(1, warmup + 1)])
    if warmup and "min_lr_ratio" not in their_options:  # whose warm-up starts at the floor
        assert rates[: warmup - 1] == pytest.approx(wanted[1:warmup])


def test_the_decay_of_wsd_is_stage_2():
    schedule = create("schedule", "wsd", {"decay_ratio": 0.3})
    assert [schedule(step, 10).stage for step in range(1, 11)] == [1] * 7 + [2] * 3


def test_a_wsd_whose_parts_do_not_fit_is_refused():
    with pytest.raises(PluginError, match="together are more than 1"):
        create("schedule", "wsd", {"warmup_ratio": 0.5, "decay_ratio": 0.6})


def test_two_stage_warms_up_across_its_stages():
    schedule = create("schedule", "two-stage", {"stage1_steps": 2, "warmup_ratio": 0.4})
    rates = [schedule(step, 10) for step in range(1, 6)]
    assert [rate.stage for rate in rates] == [1, 1, 2, 2, 2]
    wanted = [0.25e-4, 0.5e-4, 0.75e-5, 1e-5, 1e-5]
    assert [rate.learning_rate for rate in rates] == pytest.approx(wanted)


@pytest.mark.parametrize("name", ["polynomial", "wsd"])
def test_both_trainings_use_it(name, lora_config, base, dataset, gen_config):
    options = {"schedule.name": name, "schedule.warmup_ratio": 0.25, "schedule.learning_rate": 1e-3}
    config = lora_config({"training.max_steps": 4})
    config.schedule = gen_config(options).schedule  # without the options of two-stage
    adapter = train_adapter(config, Dataset(dataset(), "colors"), base, Silent())
    generator = train(gen_config(options), Silent())
    schedule = create("schedule", name, config.schedule.options)
    for run in (adapter, generator):
        entries = read_metrics(run.directory / "metrics.jsonl")
        rates = [entry["train/lr"] for entry in entries if "train/lr" in entry]
        wanted = [schedule(step, len(rates)).learning_rate for step in range(1, len(rates) + 1)]
        assert rates == pytest.approx(wanted)
