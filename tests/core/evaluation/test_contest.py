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
    Stage,
    evaluate_generator,
    hold_contest,
    rescaled,
    results_document,
    score_contestants,
)
from loragen.core.evaluation.contestants import (
    CONTESTANTS,
    LABEL_CURVE,
    NAMES,
    Contestant,
    Entry,
    EvaluationOptions,
    Routed,
    TrainedAdapter,
    choose,
)
from loragen.core.evaluation.report import (
    markdown,
    remarks,
    results_record,
    table_rows,
    tables,
    worth_in_labels,
    write_results,
)
from loragen.core.evaluation.statistics import combine
from loragen.core.evaluation.targets import find_targets
from loragen.core.lora.evaluate import Scores, evaluate_model
from loragen.core.progress import Silent
from loragen.core.run.checkpoints import read_checkpointed_adapter
from loragen.core.run.directory import LoraManifest, Run
from tests.pages import structure

ROWS = 10


def scored(accuracy, validity=0.5, loss=1.0):
    """Scores of ten rows, the first of them right."""
    hits = tuple(row < round(ROWS * accuracy) for row in range(ROWS))
    return Scores(ROWS, sum(hits) / ROWS, None, validity, 3, loss, 0.1, hits)


@pytest.fixture
def outcome(targets):
    """`outcome({"base": [0.1], "generated": [0.5, 0.7]})`: a dataset with these accuracies."""

    def make(accuracies, name="colors", validity=0.5, group="all"):
        cells = {
            column: Cell([scored(value, validity) for value in values], [0.5])
            for column, values in accuracies.items()
        }
        dataset = copy(targets[0].dataset)
        dataset.name = name
        target = replace(targets[0], dataset=dataset, group=group, rows=targets[0].rows[:ROWS])
        return DatasetScores(target, cells)

    return make


def document(outcomes, setup):
    return results_document(outcomes, setup, None)


def adapter_of(run):
    opened = Run.open(run, LoraManifest)
    return TrainedAdapter(opened, opened.checkpoints[-1])


def test_every_column_is_scored_and_the_base_is_unchanged(setup, targets, collection):
    oracles = {one.key: adapter_of(collection.runs[one.name]) for one in targets}
    joint = adapter_of(collection.runs["colors"])
    labelled = {(*one.key, size): joint for one in targets for size in LABEL_CURVE.values()}
    shared = replace(setup(batch_size=8), multi_task=joint, oracles=oracles, labelled=labelled)
    before = {key: value.clone() for key, value in shared.base.model.state_dict().items()}
    outcomes = score_contestants(shared, CONTESTANTS, targets, targets)
    after = shared.base.model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    for one in outcomes:
        assert tuple(one.cells) == NAMES
        assert len(one.cells["generated"].scores) == 2
        assert len(one.cells["best_single"].scores) == 1
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
    contestants = choose(["nearest", "ridge", "other_prompts", "generated"])

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


def test_a_training_dataset_of_the_generator_is_told_of(
    experiment, collection, targets, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(contest, "hold_contest", lambda *_: {})
    copies = [tmp_path / name for name in ("new.jsonl", "colors.jsonl")]
    for file in copies:
        file.write_bytes(collection.file("colors").read_bytes())
    new, named = find_targets(list(map(str, copies)), tmp_path)
    told = []
    for some in ([new], [new, named], targets):
        evaluate_generator(
            experiment,
            some,
            choose(["base"]),
            options=EvaluationOptions(draws=2),
            base_model=None,
            cache=tmp_path,
            progress=Silent(),
            strict=False,
        )
        told.append([r.getMessage() for r in caplog.records if "among the training" in r.msg])
        caplog.clear()
    assert told[0] == []
    assert [line.partition(":")[0] for (line,) in told[1:]] == ["colors", "animals, colors"]


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


def test_the_best_of_all_entries_counts_where_only_it_should():
    cell = Cell([scored(0.5), scored(0.7, loss=2.0), scored(0.7)])
    assert cell.mean("exact_match") == pytest.approx(1.9 / 3)
    cell.keep_best()
    (best,) = cell.scores
    assert (best.exact_match, best.loss) == (0.7, 1.0)


class TestShortlist:
    """Of many entries of which the best counts, few are scored on all rows."""

    @pytest.fixture
    def asked(self, monkeypatch):
        """`[(rows, choices)]` of every scoring. Entry number n is the n-th scored, and the larger n
        the better it is."""
        calls = []

        def score(self, model, batch_size, choices):
            calls.append((len(self.rows), choices))
            return scored(min(1.0, len(calls) / 10))

        monkeypatch.setattr(contest.TestRows, "score", score)
        return calls

    def enter(self, setup, targets, seeded, count=6):
        class Many(Contestant):
            name, title, best = "many", "many", True

            def entries(self, target, targets):
                for number in range(count):
                    yield Entry(None, float(number), seeded=number == seeded)

        (outcome,) = score_contestants(setup(choices=True), [Many], targets[:1], targets)
        return outcome.cells["many"]

    def test_the_seeded_entry_and_the_best_of_the_first_rows_answer_all(
        self, setup, targets, asked, monkeypatch
    ):
        monkeypatch.setattr(contest, "FIRST_ROWS", 5)
        monkeypatch.setattr(contest, "FINALISTS", 3)
        cell = self.enter(setup, targets, seeded=0)
        every = len(targets[0].rows)
        few = [rows for rows, choices in asked if not choices]
        assert len(few) == 6
        assert all(0 < rows <= 5 < every for rows in few)
        assert asked[6:] == [(every, True)] * 3
        assert sorted(cell.seconds) == [0.0, 4.0, 5.0]
        assert len(cell.scores) == 1

    def test_few_rows_are_answered_by_all(self, setup, targets, asked, monkeypatch):
        monkeypatch.setattr(contest, "FIRST_ROWS", len(targets[0].rows))
        self.enter(setup, targets, seeded=0)
        assert asked == [(len(targets[0].rows), True)] * 6


def test_a_contestant_with_nothing_to_enter_is_left_out(setup, targets, caplog):
    """The control of other prompts, where no other dataset is known."""
    shared = replace(setup(), sources=[setup().sources[1]])
    (alone,) = [one for one in targets if one.name == shared.sources[0].name]
    (outcome,) = score_contestants(shared, choose(["base", "other_prompts"]), [alone], [alone])
    assert list(outcome.cells) == ["base"]
    assert "other_prompts: nothing to enter" in caplog.text


def test_the_router_answers_by_several_adapters_and_leaves_the_base_as_it_was(base, setup):
    """Of two equal adapters whatever is routed is that adapter."""
    adapter = setup().collected(0)
    tokens = torch.arange(8).unsqueeze(0)

    def logits(model):
        with torch.inference_mode():
            return model(tokens).logits

    plain = logits(base.model)
    stage = Stage(base.model)
    with stage.showing(Entry(adapter), "it") as model:
        expected = logits(model)
    with stage.showing(Entry(Routed([adapter, adapter], 2)), "both") as model:
        torch.testing.assert_close(logits(model), expected)
    other = setup().collected(1)
    with stage.showing(Entry(Routed([adapter, other], 2)), "both") as model:
        assert not torch.allclose(logits(model), expected)
    with stage.showing(Entry(None), "nothing") as model:
        assert torch.equal(logits(model), plain)
    with stage.showing(Entry(adapter), "it again") as model:
        torch.testing.assert_close(logits(model), expected)
    stage.clear()
    assert torch.equal(logits(base.model), plain)


def test_an_adapter_of_another_rank_is_attached_in_place_of_the_first(base, setup):
    adapter = setup().collected(0)
    wide = Adapter(
        {**adapter.config, "r": 4, "lora_alpha": 8},
        {
            key: torch.cat([tensor, 0 * tensor], dim=1 if "lora_B" in key else 0)
            for key, tensor in adapter.tensors.items()
        },
    )
    tokens = torch.arange(8).unsqueeze(0)
    stage, found = Stage(base.model), []
    for one in (adapter, wide, adapter):
        with stage.showing(Entry(one), "it") as model, torch.inference_mode():
            found.append(model(tokens).logits)
    stage.clear()
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


def test_remarks_say_what_differs_significantly(outcome, setup):
    accuracies = {"base": [0.1], "mean": [0.6], "oracle": [1.0], "generated": [0.5, 0.6, 0.7]}
    results = document([outcome(accuracies)], setup())
    assert results["beats"] == {"all": ["base"]}
    assert results["beaten_by"] == {"all": ["oracle"]}
    (line,) = [remark for remark in remarks(results) if remark.startswith("colors: generated b")]
    assert "beats base; is beaten by oracle; shows no significant difference from mean" in line
    (share,) = [remark for remark in remarks(results) if "recovers" in remark]
    assert "(1 of 1 datasets), generated recovers 0.56 of the lead" in share


def test_remarks_of_cost_novelty_and_controls(outcome, setup):
    accuracies = {"base": [0.1], "generated": [0.5, 0.6], "gibberish_prompts": [0.1]}
    results = document([outcome(accuracies)], setup())
    results["novelty"] = {
        "collected": {"delta_w": 0.8, "factors": 0.9},
        "groups": {"all": {"delta_w": 0.25, "factors": 0.0}},
    }
    results["seconds"] |= {"train_adapter": 4.0, "generate_adapter": 2.0, "ratio": 2.0}
    plain = "\n".join(remarks(results))
    assert "cost: 4 s to train an adapter, 2 s" in plain
    assert "is 0.25 of the norm of the generated ΔW (of a collected one, of the others': 0.80)" in (
        plain
    )
    assert "the mean of 2 adapters per dataset" in plain
    assert "control gibberish: its loss is 0.000 nats" in plain
    results["seconds"]["trained"] = "side by side"
    assert "an adapter (side by side), 2 s" in "\n".join(remarks(results))


@pytest.mark.parametrize(
    "generated, expected",
    [
        (0.0, "fewer than 5"),
        (0.2, "about 5"),
        (0.3, "about 7"),  # the square root of 50
        (0.8, "about 20"),
        (0.9, "more than 20"),
    ],
)
def test_a_generated_adapter_is_worth_the_labels_of_an_equal_one(generated, expected):
    curve = {"labels_5": 0.2, "labels_10": 0.4, "labels_20": 0.8, "generated": generated}
    assert worth_in_labels(curve) == expected


def test_the_label_curve_has_a_table_of_its_own(outcome, setup):
    accuracies = {"generated": [0.5, 0.5], "labels_5": [0.1], "labels_10": [0.9]}
    results = document([outcome(accuracies)], setup())
    first, *others = tables(results)
    assert first.header == ["exact match", "generated"]
    (curve,) = [table for table in others if table.header[0] == "LoRA trained on"]
    assert curve.header == ["LoRA trained on", "5 labels", "10 labels"]
    assert curve.rows == [["colors", "0.10", "0.90"]]
    assert any("as one trained on about 7 labelled rows" in remark for remark in remarks(results))


def test_averages_are_over_datasets(outcome, setup):
    results = document(
        [
            outcome({"base": [0.0], "generated": [0.2, 0.4]}, "colors"),
            outcome({"base": [0.5], "generated": [0.9, 0.9]}, "animals"),
        ],
        setup(),
    )
    assert results["accuracy"]["all"] == {"base": 0.25, "generated": 0.6}
    assert [line.name for line in table_rows(results)] == ["colors", "animals", "mean of 2"]
    both = combine([results])
    assert both["accuracy"] == results["accuracy"]
    assert both["differences"] == results["differences"]
    assert markdown(both, "Folds").startswith("# Folds\n\n| exact match | base | generated |\n")


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


def test_the_four_files_have_the_same_content(setup, targets, tmp_path):
    results = hold_contest(setup(), choose(["base", "generated"]), targets)
    write_results(results, "A title", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "results.json").read_text("utf-8")) == results
    text = (tmp_path / "out" / "results.md").read_text("utf-8")
    assert text.startswith(markdown(results, "A title"))
    assert results_record(tmp_path / "out").keys() == {
        f"results.{kind}" for kind in ("json", "png", "html", "md")
    }
    page = structure((tmp_path / "out" / "results.html").read_text("utf-8"))
    assert page.plots == len(targets) + (len(targets) > 1)
    assert "exact match" in page.text and "novelty" in page.text
    assert text.startswith("# A title\n\n| exact match | base | generated |\n| --- | --- | --- |\n")
    assert "- novelty: outside of the span of the collected adapters is " in text
    assert (tmp_path / "out" / "results.png").stat().st_size > 5_000


def test_without_libraries_two_files_are_left_out(setup, targets, tmp_path, monkeypatch, caplog):
    for module in ("evaluation.report", "page"):
        monkeypatch.setattr(f"loragen.core.{module}.find_spec", lambda _: None)
    results = hold_contest(setup(), choose(["base", "generated"]), targets)
    write_results(results, "A title", tmp_path)
    assert sorted(file.name for file in tmp_path.glob("results.*")) == [
        "results.json",
        "results.md",
    ]
    assert "left out without matplotlib; pip install" in caplog.text
    assert "left out without plotly; pip install" in caplog.text
