import shutil

import pytest
import torch

from loragen.core.adapter.files import read_adapter, write_adapter
from loragen.core.errors import UsageError
from loragen.core.learning import plan as module
from loragen.core.learning.plan import plan

BOTH = "reconstruction-then-behaviour"


@pytest.fixture
def planned(gen_config):
    """`planned({...})`: the plan of an objective that is `auto` unless told."""
    return lambda settings=None: plan(
        gen_config({"training.objective": "auto", **(settings or {})})
    )


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
    assert found.summary().endswith(
        f"objective: {BOTH} (the base and labelled rows of every dataset are here; no transfer: "
        "2 datasets; behaviour.batch_size 8 leaves too few others, it needs 16)"
    )


def test_auto_is_transfer_where_there_are_datasets_enough(planned):
    found = planned({"behaviour.batch_size": 1})
    assert found.config.training.objective == "transfer"
    assert found.reason.endswith("are here, and datasets enough to write each from others")


@pytest.mark.parametrize(("told", "taken"), [(None, 1.0), (0.0, 0.0), (0.5, 0.5)])
def test_a_transfer_clips_its_gradients_unless_told_otherwise(planned, told, taken):
    ours = {"behaviour.batch_size": 1, "trainer.gradient_clip_val": told}
    assert planned(ours).config.trainer.gradient_clip_val == taken
    others = {"training.objective": BOTH, "trainer.gradient_clip_val": told}
    assert planned(others).config.trainer.gradient_clip_val == told


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "2 datasets; behaviour.batch_size 8 leaves too few others, it needs 16"),
        ({"behaviour.batch_size": 1, "encoder.frozen": False}, "the encoder trains along"),
    ],
)
def test_a_transfer_that_cannot_be_is_refused(planned, settings, told):
    with pytest.raises(UsageError, match=f"training.objective transfer: {told}"):
        planned({"training.objective": "transfer", **settings})


def test_auto_without_labels(planned, collection, unlabelled):
    animals = {"run": str(collection.runs["animals"])}
    found = planned({"sources": [animals, unlabelled]})
    assert found.config.training.objective == "reconstruction"
    assert found.summary().endswith(
        "objective: reconstruction (labelled rows are missing of colors)"
    )


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
    monkeypatch.setattr(module, "MOST_ON_CPU", 1000)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = planned()
    assert found.config.training.objective == "reconstruction"
    assert found.reason == "the base model has 0.0 B parameters, and there is no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert planned().config.training.objective == "reconstruction", "the trainer is told cpu"
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
    plan(config)
    assert config.training.objective == "auto"
