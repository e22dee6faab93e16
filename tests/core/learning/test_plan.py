import shutil
from types import SimpleNamespace

import pytest
import torch

from loragen.core.adapter.files import read_adapter, write_adapter
from loragen.core.config import GenTrainConfig
from loragen.core.errors import UsageError
from loragen.core.learning.objectives import behaviour as module
from loragen.core.learning.objectives import transfer
from loragen.core.learning.plan import make_phases, make_plan
from loragen.core.learning.sources import open_sources

BOTH = "reconstruction-then-behaviour"


@pytest.fixture
def planned(gen_config):
    """`planned({...})`: the plan of an objective that is `auto` by default."""

    def make(settings=None):
        ours = {"training.objective": "auto", "decoder": {"name": "auto"}}
        config = gen_config({**ours, **(settings or {})})
        return make_plan(config, open_sources(config))

    return make


@pytest.fixture
def unlabelled(collection, tmp_path):
    """The colours as a PEFT directory beside prompts without labels."""
    adapter = read_adapter(collection.runs["colors"] / "adapter")
    write_adapter(tmp_path / "colors", adapter, "")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What is red?\nAnd green?\nAnd blue?\nOr not?\n", encoding="utf-8")
    return {"checkpoints": str(tmp_path / "colors"), "prompts": str(prompts)}


def test_auto_is_both_where_the_base_and_the_labels_are_here(planned):
    found = planned()
    assert found.config.training.objective == BOTH
    assert found.config.decoder.name == "hyperconv"
    assert f"objective: {BOTH} (" in found.summary()
    assert "decoder: hyperconv: A hyper-convolutional decoder" in found.summary()
    assert "no transfer: 2 datasets; it needs 3" in found.reason


def test_auto_is_by_transfer_where_there_are_datasets_enough(planned, monkeypatch):
    monkeypatch.setattr(transfer, "MIN_FOR_AUTO", 2)
    found = planned()
    assert found.config.training.objective == "transfer"
    assert found.tries_mixture
    assert "enough datasets" in found.reason
    assert "decoder: neighbours: " in found.summary()
    assert "; or mixture, if " in found.summary()
    assert not planned({"trainer.devices": 2}).tries_mixture  # processes might decide differently


def test_a_configured_decoder_is_compared_with_no_other(planned):
    found = planned({"training.objective": "transfer", "decoder": {"name": "mixture"}})
    assert not found.tries_mixture
    assert "decoder: mixture: An affine combination of the collected adapters" in found.summary()


@pytest.mark.parametrize(
    ("settings", "objective", "decoder"),
    [
        ({"training.objective": "transfer"}, "transfer", "neighbours"),
        ({"training.objective": "behaviour"}, "behaviour", "hyperconv"),
        ({"decoder": {"name": "mixture"}}, "transfer", "mixture"),
        ({"decoder": {"name": "hyperconv"}}, BOTH, "hyperconv"),
    ],
)
def test_objective_and_decoder_follow_each_other(
    planned, monkeypatch, settings, objective, decoder
):
    monkeypatch.setattr(transfer, "MIN_FOR_AUTO", 2)
    config = planned(settings).config
    assert (config.training.objective, config.decoder.name) == (objective, decoder)


@pytest.mark.parametrize(("given", "resolved"), [(None, 1.0), (0.0, 0.0), (0.5, 0.5)])
def test_a_transfer_clips_its_gradients_by_default(planned, given, resolved):
    clip = {"trainer.gradient_clip_val": given}
    ours = {"training.objective": "transfer", **clip}
    assert planned(ours).config.trainer.gradient_clip_val == resolved
    others = {"training.objective": BOTH, **clip}
    assert planned(others).config.trainer.gradient_clip_val == given


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"sources": "one"}, "transfer: 1 dataset; it needs 2"),
        ({"training.objective": "reconstruction-then-transfer"}, "train different decoders"),
        ({"encoder.frozen": False}, "transfer: the encoder is trained"),
        ({"decoder": {"name": "hyperconv"}}, "the decoder hyperconv cannot transfer"),
        (
            {"training.objective": "reconstruction", "decoder": {"name": "mixture"}},
            "the decoder mixture is trained on left-out datasets",
        ),
    ],
)
def test_a_transfer_that_cannot_be_is_refused(planned, collection, settings, problem):
    if "sources" in settings:
        settings = {"sources": [{"run": str(collection.runs["animals"])}]}
    with pytest.raises(UsageError, match=problem):
        planned({"training.objective": "transfer", **settings})


def test_auto_without_labels(planned, collection, unlabelled):
    animals = {"run": str(collection.runs["animals"])}
    found = planned({"sources": [animals, unlabelled]})
    assert found.config.training.objective == "reconstruction"
    assert found.reason == "labelled rows are missing of colors"


def test_auto_with_a_base_that_is_not_here(planned, collection):
    away = collection.base.rename(collection.base.with_name("away"))
    try:
        found = planned()
    finally:
        away.rename(collection.base)
    assert found.config.training.objective == "reconstruction"
    assert found.reason == f"the base model {collection.base} is not on this machine"


def test_auto_with_a_base_on_the_hub_alone(planned):
    found = planned({"behaviour.base_model": "nobody/has-this"})
    assert found.config.training.objective == "reconstruction"
    assert found.reason == "the base model nobody/has-this is not on this machine"


def test_a_base_that_moved_is_named(planned, collection, tmp_path):
    moved = shutil.copytree(collection.base, tmp_path / "moved")
    away = collection.base.rename(collection.base.with_name("away"))
    try:
        found = planned({"behaviour.base_model": str(moved)})
    finally:
        away.rename(collection.base)
    assert found.config.training.objective == BOTH


def test_auto_with_a_base_that_is_too_large_without_a_gpu(planned, monkeypatch):
    monkeypatch.setattr(module, "MAX_ON_CPU", 1000)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = planned()
    assert found.config.training.objective == "reconstruction"
    assert found.reason == "the base model has 0.0 B parameters, and there is no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert planned().config.training.objective == "reconstruction", "accelerator: cpu"
    assert planned({"trainer.accelerator": "auto"}).config.training.objective == BOTH


@pytest.mark.parametrize("objective", ["reconstruction", "behaviour", BOTH])
def test_what_is_asked_for_is_done(planned, objective):
    found = planned({"training.objective": objective})
    assert found.config.training.objective == objective
    assert found.reason == "as configured"


@pytest.mark.parametrize("objective", ["behaviour", BOTH])
def test_behaviour_without_labels_is_refused_by_name(planned, collection, unlabelled, objective):
    animals = {"run": str(collection.runs["animals"])}
    wanted = f"training.objective {objective}: labelled rows are missing of colors"
    with pytest.raises(UsageError, match=wanted):
        planned({"sources": [animals, unlabelled], "training.objective": objective})


def test_the_callers_configuration_stays_as_it_is(gen_config):
    config = gen_config({"training.objective": "auto"})
    make_plan(config, open_sources(config))
    assert config.training.objective == "auto"


HOOKS = """
from loragen import hookimpl

@hookimpl
def loragen_objectives():
    return {"first": "toys_classes:First", "second": "toys_classes:Second"}
"""
CLASSES = """
from loragen.core.protocols import Objective

class First(Objective):
    def __init__(self, options, data):
        self.steps, self.learning_rate = 20, 1e-3

class Second(Objective):
    def __init__(self, options, data):
        self.steps, self.learning_rate = 20, 1e-4
"""
for_each = "    class Config(BaseModel, extra='forbid'):\n        pass\n"


@pytest.fixture
def phases(install):
    """`phases(**sections)`: 20 steps of each of two objectives; an epoch has 5."""
    classes = CLASSES.replace("    def", f"{for_each}\n    def")
    install("toys", HOOKS, toys_classes=f"from pydantic import BaseModel\n{classes}")

    def make(schedule="cosine", **sections):
        training = {"objective": "first-then-second"}
        config = GenTrainConfig(training=training, schedule={"name": schedule}, **sections)
        pairs = SimpleNamespace(steps_per_epoch=5)
        return make_phases(config, SimpleNamespace(pairs=lambda: pairs))

    return make


def test_steps_are_divided_into_phases(phases):
    found = phases()
    assert [(found.at(step)[0].name, found.at(step)[1]) for step in (1, 20, 21, 40, 41)] == [
        ("first", 1),
        ("first", 20),
        ("second", 1),
        ("second", 20),
        ("second", 20),
    ]
    assert found.total == 40
    assert found.last.name == "second"
    assert str(found) == "20 steps of first, then 20 steps of second"
    assert [found.epochs(step) for step in (5, 20, 40)] == [1.0, 4.0, 8.0]


@pytest.mark.parametrize(
    ("trainer", "steps"),
    [
        ({"limit_train_batches": 6}, 6),
        ({"limit_train_batches": 6, "accumulate_grad_batches": 4}, 2),
        ({"limit_train_batches": 0.26}, 6),
        ({"limit_train_batches": 99}, 20),
    ],
)
def test_a_limit_ends_every_phase_earlier(phases, trainer, steps):
    assert [phase.steps for phase in phases(trainer=trainer)] == [steps, steps]


def test_every_phase_has_a_schedule_of_its_own(phases):
    found = phases()
    rates = [found.rate(step).learning_rate for step in range(1, 41)]
    assert rates[20:] == pytest.approx([rate / 10 for rate in rates[:20]])
    assert max(rates[:20]) == pytest.approx(1e-3, rel=0.1)
    assert found.rate(41) == found.rate(40)  # which LambdaLR reads
