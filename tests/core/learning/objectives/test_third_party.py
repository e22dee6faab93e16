"""An objective of another package: one class, named in the configuration."""

import pytest
import torch

from loragen.core.errors import ConfigError
from loragen.core.learning.plan import make_plan
from loragen.core.learning.sources import open_sources
from loragen.core.learning.train import GeneratorPoint, train
from loragen.core.progress import Silent
from loragen.core.run.directory import GENERATOR_FILE
from loragen.core.run.metrics import read_metrics
from loragen.scaffold import Scaffold

HOOKS = """
from loragen import hookimpl

@hookimpl
def loragen_objectives():
    return {"cosine-distance": "cosine_objective:CosineDistance"}
"""
OBJECTIVE = Scaffold("cosine-distance", "objective").documents[
    "src/loragen_cosine_distance/objective.py"
]
"""What `loragen plugins new` writes."""


@pytest.fixture
def config(install, gen_config):
    """`config({...})`: trains for the cosine distance, two steps."""
    install("their-objective", HOOKS, cosine_objective=OBJECTIVE)
    ours = {
        "training.objective": "cosine-distance",
        "training.objective_options": {"cosine-distance": {"steps": 2}},
    }
    return lambda settings=None: gen_config({**ours, **(settings or {})})


def test_it_is_trained_by_name_and_selects_the_step(config):
    run = train(config(), Silent())
    document = torch.load(run.directory / GENERATOR_FILE, weights_only=True)
    assert document["provenance"]["trained_for"] == "2 steps of cosine-distance"
    assert "val/distance" in document["provenance"]["chosen_by"]
    logged = read_metrics(run.directory / "metrics.jsonl")
    assert [entry["step"] for entry in logged if "train/loss" in entry] == [1, 2]
    (best,) = run.directory.glob("checkpoints/epoch=*")
    assert "val_distance=" in best.name
    records = {(one.kind, one.name, one.distribution) for one in run.manifest.plugins}
    assert ("objective", "cosine-distance", "their-objective") in records
    assert GeneratorPoint.find(run.directory).step == 2


def test_it_may_follow_another_one(config):
    settings = {"training.objective": "reconstruction-then-cosine-distance"}
    run = train(config({**settings, "training.max_steps": 3}), Silent())
    document = torch.load(run.directory / GENERATOR_FILE, weights_only=True)
    trained_for = "3 steps of reconstruction, then 2 steps of cosine-distance"
    assert document["provenance"]["trained_for"] == trained_for


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"training.objective": "cosine-distanc"}, "training.objective: .*cosine-distance"),
        ({"training.objective": "reconstruction-then-x"}, "training.objective: .*'x'"),
        (
            {"training.objective_options": {"cosine-distance": {"stepz": 1}}},
            r"training\.objective_options\.cosine-distance\.stepz",
        ),
    ],
)
def test_what_is_wrong_in_the_configuration_is_named(config, settings, problem):
    with pytest.raises(ConfigError, match=problem):
        config(settings)


def test_auto_prefers_an_objective_that_claims_an_earlier_place(install, gen_config):
    automatic = "automatic = Automatic(5, 'cosine-distance', 'it always can')\n\n    class Config"
    source = OBJECTIVE.replace("class Config", automatic).replace("Metric,", "Automatic, Metric,")
    install("their-objective", HOOKS, cosine_objective=source)
    config = gen_config({"training.objective": "auto"})
    found = make_plan(config, open_sources(config))
    assert found.config.training.objective == "cosine-distance"
    assert found.reason == "it always can"


def test_auto_leaves_out_an_objective_that_does_not_load(install, gen_config, caplog):
    install("their-objective", HOOKS, cosine_objective="import a_module_that_is_missing")
    config = gen_config({"training.objective": "auto"})
    found = make_plan(config, open_sources(config))
    assert found.config.training.objective == "reconstruction-then-behaviour"
    assert "cosine-distance" in caplog.text


def test_plugins_of_others_make_up_a_whole_training(install, gen_config, monkeypatch, tmp_path):
    """One of each kind, as `loragen plugins new` writes it."""
    kinds = {"objective": "steps", "encoder": "dim", "decoder": "rank", "logger": "every"}
    options = {kind: {option: 2} for kind, option in kinds.items()}
    for kind in (*kinds, "schedule"):
        Scaffold(f"their-{kind}", kind).write(tmp_path / "packages" / kind)
        monkeypatch.syspath_prepend(tmp_path / "packages" / kind / "src")
        hooks = f"from loragen_their_{kind} import loragen_{kind}s  # noqa: F401\n"
        install(f"theirs-{kind}", hooks)
    run = train(
        gen_config(
            {
                "training.objective": "their-objective",
                "training.objective_options": {"their-objective": options["objective"]},
                "encoder": {"name": "their-encoder", **options["encoder"]},
                "decoder": {"name": "their-decoder", **options["decoder"]},
                "schedule": {"name": "their-schedule"},
                "loggers": {"their-logger": options["logger"]},
            }
        ),
        Silent(),
    )
    records = {(one.kind, one.name) for one in run.manifest.plugins}
    assert records == {(kind, f"their-{kind}") for kind in (*kinds, "schedule")}
    table = (run.directory / "their-logger" / "metrics.tsv").read_text(encoding="utf-8")
    assert {line.split("\t")[0] for line in table.splitlines()} == {"2"}  # every second step
    assert (run.directory / GENERATOR_FILE).is_file()
