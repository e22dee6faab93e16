"""From datasets to the table: scores, results document, remarks."""

import json
from concurrent.futures import Future
from copy import copy
from dataclasses import replace

import pytest
import torch

from loragen.core.adapter.files import Adapter, attach_adapter, read_adapter, swap_adapter
from loragen.core.evaluation import contest
from loragen.core.evaluation.contest import (
    Cell,
    DatasetScores,
    evaluate_generator,
    hold_contest,
    rescaled,
    results_document,
    score_contestants,
)
from loragen.core.evaluation.contestants import (
    CONTESTANTS,
    NAMES,
    EvaluationOptions,
    TrainedAdapter,
    choose,
)
from loragen.core.evaluation.report import markdown, remarks, table_rows, tables, write_results
from loragen.core.lora.evaluate import Scores, evaluate_model
from loragen.core.progress import Silent
from loragen.core.run.checkpoints import read_checkpointed_adapter
from loragen.core.run.directory import LoraManifest, Run

OTHERS = ("base", "mean_adapter", "oracle")


@pytest.fixture
def outcome(targets):
    """`outcome({"base": [0.1], "generated": [0.5, 0.7]})`: a dataset with these accuracies."""

    def make(accuracies, name="colors", validity=0.5, group="all"):
        cells = {
            column: Cell(
                [Scores(10, value, None, validity, 3, 1.0, 0.1) for value in values], [0.5]
            )
            for column, values in accuracies.items()
        }
        dataset = copy(targets[0].dataset)
        dataset.name = name
        return DatasetScores(replace(targets[0], dataset=dataset, group=group), cells)

    return make


def document(outcomes, setup):
    return results_document(outcomes, setup, None)


def adapter_of(run):
    opened = Run.open(run, LoraManifest)
    return TrainedAdapter(opened, opened.checkpoints[-1])


def test_every_column_is_scored_and_the_base_is_unchanged(setup, targets, collection):
    oracles = {one.key: adapter_of(collection.runs[one.name]) for one in targets}
    joint = adapter_of(collection.runs["colors"])
    shared = replace(setup(batch_size=8), multi_task=joint, oracles=oracles)
    before = {key: value.clone() for key, value in shared.base.model.state_dict().items()}
    outcomes = score_contestants(shared, CONTESTANTS, targets, targets)
    after = shared.base.model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    for one in outcomes:
        assert tuple(one.cells) == NAMES
        assert len(one.cells["generated"].scores) == 2
        assert one.cells["oracle"].seconds == [oracles[one.target.key].seconds]
        assert one.cells["base"].seconds == []
    results = document(outcomes, shared)
    assert results["seconds"]["obtain"]["multi_task"] == round(joint.seconds, 4)
    json.dumps(results)


def test_a_score_is_the_one_that_lora_eval_would_give(setup, base, targets, collection):
    oracles = {one.key: adapter_of(collection.runs[one.name]) for one in targets}
    shared = replace(setup(), oracles=oracles)
    (outcome, _) = score_contestants(shared, choose(["base", "oracle"]), targets, targets)
    rows = targets[0].rows
    alone = evaluate_model(base.model, base.tokenizer, rows, choices=False)
    assert outcome.cells["base"].scores[0].exact_match == alone.exact_match
    adapter = read_checkpointed_adapter(collection.runs[targets[0].name])
    model = attach_adapter(base.model, adapter, "it")
    with_it = evaluate_model(model, base.tokenizer, rows, choices=False)
    assert outcome.cells["oracle"].scores[0].exact_match == with_it.exact_match


def test_a_contest_in_parts_has_the_results_of_one_in_this_process(setup, targets):
    contestants = choose(["nearest_adapter", "random_prompts", "generated"])

    def submit(function, *arguments):
        future = Future()
        future.set_result(function(setup(), *arguments))
        return future

    whole = hold_contest(setup(), contestants, targets)
    parts = hold_contest(setup(), contestants, targets, submit)
    assert whole.pop("seconds").keys() == parts.pop("seconds").keys()
    assert parts == whole


def test_the_base_answers_on_the_best_device(experiment, targets, tmp_path, monkeypatch):
    """`meta` stands for a GPU."""
    devices = []
    monkeypatch.setattr(contest, "best_device", lambda: torch.device("meta"))
    monkeypatch.setattr(
        contest, "hold_contest", lambda setup, *_: devices.append(setup.base.model.device) or {}
    )
    evaluate_generator(
        experiment,
        targets,
        choose(["base"]),
        options=EvaluationOptions(draws=2),
        base_model=None,
        cache=tmp_path,
        progress=Silent(),
        strict=False,
    )
    assert devices == [torch.device("meta")]


@pytest.mark.parametrize(
    "other", [{"lora_alpha": 48}, {"use_rslora": True}, {"alpha_pattern": {".*q_proj": 1}}]
)
def test_an_adapter_of_another_alpha_answers_with_its_own(base, collection, other):
    ours = read_adapter(collection.runs["colors"] / "adapter")
    theirs = Adapter({**ours.config, **other}, ours.tensors)
    tokens = torch.arange(8).unsqueeze(0)

    def logits(model):
        with torch.inference_mode():
            return model(tokens).logits

    model = attach_adapter(base.model, theirs, "theirs")
    expected = logits(model)
    model.unload()
    model = attach_adapter(base.model, ours, "ours")
    try:
        assert not torch.allclose(logits(model), expected)
        swap_adapter(model, rescaled(theirs, ours.config), "theirs")
        torch.testing.assert_close(logits(model), expected)
    finally:
        model.unload()
    assert rescaled(ours, ours.config) is ours


def test_only_columns_outside_the_interval_differ_significantly(outcome, setup):
    accuracies = {
        "base": [0.1],
        "mean_adapter": [0.6],
        "oracle": [1.0],
        "generated": [0.5, 0.6, 0.7],
    }
    results = document([outcome(accuracies)], setup())
    assert results["beats"] == {"all": ["base"]}
    assert results["beaten_by"] == {"all": ["oracle"]}
    (line,) = [remark for remark in remarks(results) if remark.startswith("colors")]
    assert "beats base; is beaten by oracle; shows no significant difference from mean" in line


def test_remarks_of_cost_and_novelty(outcome, setup):
    results = document([outcome({"base": [0.1], "generated": [0.5, 0.6]})], setup())
    results["novelty"] = {
        "within_a_dataset": 1.0,
        "groups": {"all": {"to_nearest": 2.0, "to_mean": 3.0}},
    }
    results["seconds"] |= {"train_adapter": 4.0, "generate_adapter": 2.0, "ratio": 2.0}
    plain = "\n".join(remarks(results))
    assert "cost: 4 s to train an adapter, 2 s" in plain
    assert "from the nearest training checkpoint and 3 from the mean" in plain
    assert "the mean of 2 adapters per dataset" in plain
    results["novelty"]["checkpoints_of_each"] = 5
    results["seconds"]["trained"] = "side by side"
    more = "\n".join(remarks(results))
    assert "an adapter (side by side), 2 s" in more
    assert "checkpoint (of 5 of each dataset's, evenly spaced) and 3 from the mean" in more


def test_equal_values_beat_nobody(outcome, setup):
    accuracies = {"base": [1 / 3], "generated": [1 / 3, 1 / 3]}
    results = document([outcome(accuracies)], setup())
    assert (results["beats"], results["beaten_by"]) == ({"all": []}, {"all": []})


def test_averages_are_over_datasets_and_their_interval_covers_both_kinds_of_chance(outcome, setup):
    results = document(
        [
            outcome({"base": [0.0], "generated": [0.2, 0.4]}, "colors"),
            outcome({"base": [0.5], "generated": [0.9, 0.9]}, "animals"),
        ],
        setup(),
    )
    assert results["accuracy"]["all"] == {"base": 0.25, "generated": 0.6}
    assert results["interval"]["all"]["generated"] == [0.0, 1.0]  # of two datasets, little is known
    assert [line.name for line in table_rows(results)] == ["colors", "animals", "mean of 2"]


def test_several_groups_replace_their_datasets(outcome, setup):
    accuracies = {"base": [0.0], "generated": [0.2, 0.4]}
    results = document(
        [outcome(accuracies, group="both"), outcome(accuracies, group="new_wording")], setup()
    )
    assert [line.name for line in table_rows(results)] == ["both", "new wording"]
    assert set(results["accuracy"]) == {"both", "new_wording"}


def test_a_measure_that_a_dataset_lacks_has_no_average(outcome, setup):
    accuracies = {"base": [0.0], "generated": [0.2, 0.4]}
    outcomes = [outcome(accuracies), outcome(accuracies, "animals", validity=None)]
    results = document(outcomes, setup())
    assert "format_validity" not in results
    assert results["datasets"][0]["format_validity"] == {"base": 0.5, "generated": 0.5}
    validity = next(table for table in tables(results) if table.header[0] == "format validity")
    assert [row[0] for row in validity.rows] == ["colors"]


def test_the_three_files_have_the_same_content(setup, targets, tmp_path):
    results = hold_contest(setup(), choose(["base", "generated"]), targets)
    write_results(results, "A title", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "results.json").read_text("utf-8")) == results
    text = (tmp_path / "out" / "results.md").read_text("utf-8")
    assert text == markdown(results, "A title")
    assert text.startswith("# A title\n\n| exact match | base | generated |\n| --- | --- | --- |\n")
    assert "- novelty: the generated ΔW is " in text
    assert (tmp_path / "out" / "results.png").stat().st_size > 5_000


def test_without_matplotlib_the_picture_is_left_out(setup, targets, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("loragen.core.evaluation.report.find_spec", lambda _: None)
    results = hold_contest(setup(), choose(["base", "generated"]), targets)
    write_results(results, "A title", tmp_path)
    assert sorted(file.name for file in tmp_path.glob("results.*")) == [
        "results.json",
        "results.md",
    ]
    assert "loragen[plots]" in caplog.text
