"""The report of runs that no training has made, with checkpoints of small adapters."""

import json

import pytest
import torch

from loragen.core.errors import DataError, UsageError
from loragen.core.evaluation.runs_report import RunsReport, find_evaluations, with_checkpoints
from loragen.core.run.history.comparison import OpenedRun
from loragen.core.run.history.listing import find_run
from tests.browser import opened
from tests.core.analysis.conftest import drifting_adapters
from tests.made_runs import CONFIG, log, make_run
from tests.pages import structure

pytest.importorskip("plotly")


def results(generator, **changes):
    """What `gen eval` writes of one dataset, as far as a page needs it."""
    columns = ["base", "generated"]
    values = {
        "accuracy": {"base": 0.25, "generated": 0.75},
        "loss": {"base": 2.0, "generated": 1.0},
        "interval": {"base": [0.125, 0.5], "generated": [0.5, 0.875]},
        "differences": {"base": {"mean": 0.5, "low": 0.25, "high": 0.625}},
        "beats": ["base"],
        "beaten_by": [],
    }
    dataset = {"name": "arc", "rows": 8, "prompts": 4, "prompts_from": "tested rows", **values}
    return {
        "generator": str(generator),
        "columns": columns,
        **{name: {"all": value} for name, value in values.items()},
        "seconds": {"ratio": None, "obtain": dict.fromkeys(columns)},
        "multi_task": None,
        "novelty": None,
        "options": {"shots": 4, "draws": 2},
        "datasets": [dataset],
        **changes,
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two runs of lora train with checkpoints, one of gen train, and an evaluation of it."""
    home = tmp_path_factory.mktemp("home")
    for seed, (name, batch) in enumerate({"arc_lora_1": "16", "boolq <b>_lora_1": "32"}.items()):
        settings = CONFIG.replace("16", batch)
        run = make_run(
            home / "runs",
            name,
            losses=[3.0, 2.0, 1.0],
            val={2: 0.5, 3: 0.25},
            settings=settings,
            environment={"torch": "9.9", "device": "a GPU"},
            adapter_config={"r": 2, "lora_alpha": 4, "peft_type": "LORA"},
        )
        log(run, [{"step": step, "train/lr": 0.1} for step in (1, 2)])
        for file in (run / "checkpoints").iterdir():
            file.unlink()
        for step, tensors in enumerate(drifting_adapters(12, seed=seed), start=1):
            torch.save(tensors, run / "checkpoints" / f"checkpoint-step-{step:03d}.ckpt")
    experiment = make_run(
        home / "experiments",
        "lora_generator_1",
        kind="generator",
        dataset=None,
        source_records=[{"name": "arc", "place": "runs/arc", "count": 2, "checkpoints": "abc"}],
    )
    file = experiment / "results" / "final_model" / "generator_model.pt"
    for folder, document in {
        "results": results(file),
        "of-another": results(home / "experiments" / "lora_generator_2" / file.name),
        "damaged": {"accuracy": 1},
    }.items():
        (home / folder).mkdir()
        (home / folder / "results.json").write_text(json.dumps(document), "utf-8")
    return home


def open_all(home):
    paths = [*sorted((home / "runs").iterdir()), home / "experiments" / "lora_generator_1"]
    return [OpenedRun(find_run(str(path))) for path in paths]


@pytest.fixture(scope="module")
def report(home):
    runs = open_all(home)
    return RunsReport(runs, find_evaluations(runs, []), (), with_checkpoints(runs)).page().html()


def test_every_run_and_what_is_known_of_it_is_on_the_page(report, home):
    found = structure(report)
    assert found.headings == [
        "Report of 3 runs",
        *("Runs", "Differences", "Curves", "Checkpoints", "Side by side"),
        *("arc_lora_1", "boolq <b>_lora_1", "Evaluation"),
        *("A: arc_lora_1", "B: boolq <b>_lora_1", "C: lora_generator_1"),
    ]
    for text in (
        "training.batch_size",  # differs
        *("val/loss", "train/lr", "All other metrics"),
        "At most 8 checkpoints of each run",
        *("0.75 [0.50, 0.88]", "+0.50 [+0.25, +0.62]"),
        *("9.9", "a GPU", "1 source", "runs/arc"),
        f"loragen lora train --config {home}/runs/arc_lora_1/config.yaml",
        f"loragen lora train --config '{home}/runs/boolq <b>_lora_1/config.yaml'",
        f"loragen gen train --config {home}/experiments/lora_generator_1/config.yaml",
    ):
        assert text in found.text
    # Losses, validation, the learning rate; side by side; six of each series; the evaluation.
    assert found.plots == 3 + 3 + 2 * 6 + 1


def test_a_long_series_is_read_in_part(report):
    assert report.count("<dt>checkpoints</dt><dd>8</dd>") == 2


def test_one_run_has_no_differences(home):
    found = structure(RunsReport(open_all(home)[:1]).page().html())
    assert found.headings == ["arc_lora_1", "Runs", "Curves", "Provenance"]
    assert found.plots == 3


def test_evaluations_are_found_by_the_generator_that_they_name(home):
    runs = open_all(home)
    assert [one.file.parent.name for one in find_evaluations(runs, [])] == ["results"]
    assert find_evaluations(runs[:2], []) == []
    given = find_evaluations(runs, [home / "of-another"])
    assert [one.file.parent.name for one in given] == ["of-another", "results"]
    with pytest.raises(UsageError, match="no such file"):
        find_evaluations(runs, [home / "runs"])
    with pytest.raises(DataError, match="not the results of `gen eval`"):
        find_evaluations(runs, [home / "damaged"])


def test_damaged_checkpoints_and_manifests_do_not_prevent_the_rest(tmp_path):
    run = make_run(tmp_path, "arc_lora_1")  # its checkpoints are zeros
    broken = make_run(tmp_path, "boolq_lora_1")
    (broken / "manifest.json").write_text("{", "utf-8")
    runs = [OpenedRun(find_run(str(path))) for path in (run, broken)]
    page = RunsReport(runs, (), (), with_checkpoints(runs)).page().html()
    text = structure(page).text
    assert "The checkpoints could not be analysed" in text
    assert "The manifest cannot be read" in text


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (900, "light"), (1440, "dark")])
def test_in_a_browser(report, tmp_path, width, scheme):
    file = tmp_path / "report.html"
    file.write_text(report, "utf-8")
    with opened(file, width, scheme) as page:
        drawn = page.locator(".plot .main-svg:first-of-type")
        assert drawn.count() == page.locator("section > .plots .plot").count() > 15
        assert page.locator("text=lora_generator_1").count() > 0
