"""From datasets to the table: what is scored, what is told, and what may be claimed."""

import json
from dataclasses import replace

import pytest
import torch

from loragen.core.adapter.files import Adapter, attach_adapter, read_adapter, swap_adapter
from loragen.core.evaluation.contest import Cell, DatasetScores, hold, results_document, scaled_as
from loragen.core.evaluation.contestants import COLUMNS, NAMES, Trained, chosen
from loragen.core.evaluation.report import lines, markdown, remarks, tables, write
from loragen.core.evaluation.statistics import novelty
from loragen.core.lora.evaluate import Scores, evaluate
from loragen.core.run.checkpoints import read_checkpointed_adapter

OTHERS = ("base", "mean_adapter", "oracle")


@pytest.fixture
def outcome(targets):
    """`outcome({"base": [0.1], "generated": [0.5, 0.7]})`: a dataset with these accuracies."""

    def make(accuracies, name="colors", validity=0.5, group="all"):
        cells = {
            column: Cell([Scores(10, value, None, validity, 3, 0.1) for value in values], [0.5])
            for column, values in accuracies.items()
        }
        return DatasetScores(replace(targets[0], name=name, group=group), cells)

    return make


def told(outcomes, bench):
    return results_document(outcomes, bench, None)


def test_every_column_is_scored_and_the_base_is_handed_back(bench, targets, collection):
    made = bench(batch_size=8)
    oracles = {one.key: Trained(collection.runs[one.name], 2.0, 8) for one in targets}
    made = replace(made, multi_task=Trained(collection.runs["colors"], 3.0, 8), oracles=oracles)
    before = {key: value.clone() for key, value in made.base.model.state_dict().items()}
    outcomes = hold(made, COLUMNS, targets)
    after = made.base.model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    for one in outcomes:
        assert tuple(one.cells) == NAMES
        assert len(one.cells["generated"].scores) == 2
        assert one.cells["oracle"].seconds == [2.0]
        assert one.cells["base"].seconds == []
    results = told(outcomes, made)
    assert results["seconds"]["obtain"]["multi_task"] == 3.0
    json.dumps(results)


def test_a_score_is_the_one_that_lora_eval_would_give(bench, base, targets, collection):
    made = bench()
    oracles = {one.key: Trained(collection.runs[one.name], 2.0, 8) for one in targets}
    (outcome, _) = hold(replace(made, oracles=oracles), chosen(["base", "oracle"]), targets)
    rows = targets[0].rows
    alone = evaluate(base.model, base.tokenizer, rows, choices=False)
    assert outcome.cells["base"].scores[0].exact_match == alone.exact_match
    adapter = read_checkpointed_adapter(collection.runs[targets[0].name])
    assert (
        adapter.tensors.keys()
        == read_adapter(collection.runs[targets[0].name] / "adapter").tensors.keys()
    )
    model = attach_adapter(base.model, adapter, "it")
    with_it = evaluate(model, base.tokenizer, rows, choices=False)
    assert outcome.cells["oracle"].scores[0].exact_match == with_it.exact_match


def test_a_part_has_the_outcomes_of_the_whole(bench, targets):
    columns = chosen(["nearest_adapter", "random_prompts", "generated"])

    def scores(outcomes):
        return [
            {name: [replace(score, seconds=0) for score in cell.scores] for name, cell in cells}
            for cells in (outcome.cells.items() for outcome in outcomes)
        ]

    whole = hold(bench(), columns, targets)
    parts = [hold(bench(), columns, [one], among=targets)[0] for one in targets]
    assert [part.target for part in parts] == targets
    assert scores(parts) == scores(whole)


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
        swap_adapter(model, scaled_as(theirs, ours.config), "theirs")
        torch.testing.assert_close(logits(model), expected)
    finally:
        model.unload()
    assert scaled_as(ours, ours.config) is ours


def test_only_what_lies_outside_the_interval_is_claimed(outcome, bench):
    made = {"base": [0.1], "mean_adapter": [0.6], "oracle": [1.0], "generated": [0.5, 0.6, 0.7]}
    results = told([outcome(made)], bench())
    assert results["beats"] == {"all": ["base"]}
    assert results["beaten_by"] == {"all": ["oracle"]}
    (claim,) = [said for said in remarks(results) if said.startswith("colors")]
    assert claim == (
        "colors: generated beats base; is beaten by oracle; is not told apart from mean"
    )


def test_what_only_some_evaluations_know_is_told_where_it_is_known(outcome, bench):
    results = told([outcome({"base": [0.1], "generated": [0.5, 0.6]})], bench())
    results["novelty"] = {
        "within_a_dataset": 1.0,
        "groups": {"all": {"to_nearest": 2.0, "to_mean": 3.0}},
    }
    results["seconds"] |= {"train_adapter": 4.0, "generate_adapter": 2.0, "ratio": 2.0}
    plain = "\n".join(remarks(results))
    assert "cost: 4 s to train an adapter, 2 s" in plain
    assert "from the nearest training checkpoint and 3 from the mean" in plain
    assert "compared with the other columns' values as they stand" in plain
    results["novelty"]["checkpoints_of_each"] = 5
    results["seconds"]["trained"] = "side by side"
    more = "\n".join(remarks(results))
    assert "an adapter (side by side), 2 s" in more
    assert "checkpoint (of 5 of each dataset's, evenly spaced) and 3 from the mean" in more


def test_equal_values_beat_nobody(outcome, bench):
    made = {"base": [1 / 3], "generated": [1 / 3, 1 / 3]}
    results = told([outcome(made)], bench())
    assert (results["beats"], results["beaten_by"]) == ({"all": []}, {"all": []})


def test_averages_are_over_datasets_and_their_interval_covers_both_kinds_of_chance(outcome, bench):
    results = told(
        [
            outcome({"base": [0.0], "generated": [0.2, 0.4]}, "colors"),
            outcome({"base": [0.5], "generated": [0.9, 0.9]}, "animals"),
        ],
        bench(),
    )
    assert results["accuracy"]["all"] == {"base": 0.25, "generated": 0.6}
    assert results["interval"]["all"]["generated"] == [0.0, 1.0]  # two datasets tell little
    assert [line.name for line in lines(results)] == ["colors", "animals", "mean of 2"]


def test_groups_are_told_in_place_of_their_datasets(outcome, bench):
    made = {"base": [0.0], "generated": [0.2, 0.4]}
    results = told([outcome(made, group="both"), outcome(made, group="new_wording")], bench())
    assert [line.name for line in lines(results)] == ["both", "new wording"]
    assert set(results["accuracy"]) == {"both", "new_wording"}


def test_a_measure_that_a_dataset_lacks_has_no_average(outcome, bench):
    made = {"base": [0.0], "generated": [0.2, 0.4]}
    outcomes = [outcome(made), outcome(made, "animals", validity=None)]
    results = told(outcomes, bench())
    assert "format_validity" not in results
    assert results["datasets"][0]["format_validity"] == {"base": 0.5, "generated": 0.5}
    validity = next(table for table in tables(results) if table.header[0] == "format validity")
    assert [row[0] for row in validity.rows] == ["colors"]


def test_the_three_files_say_the_same(bench, targets, tmp_path):
    made = bench()
    outcomes = hold(made, chosen(["base", "generated"]), targets)
    results = results_document(outcomes, made, novelty(made, targets))
    write(results, "A title", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "results.json").read_text("utf-8")) == results
    text = (tmp_path / "out" / "results.md").read_text("utf-8")
    assert text == markdown(results, "A title")
    assert text.startswith("# A title\n\n| exact match | base | generated |\n| --- | --- | --- |\n")
    assert "- novelty: the generated ΔW is " in text
    assert (tmp_path / "out" / "results.png").stat().st_size > 5_000
