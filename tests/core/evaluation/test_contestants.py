"""Each contestant's own rule, and which of them take part."""

from dataclasses import replace

import pytest
import torch

from loragen.core.adapter.files import read_adapter
from loragen.core.data.dataset import Dataset, Row
from loragen.core.data.formats import Turn
from loragen.core.errors import UsageError
from loragen.core.evaluation.contestants import (
    FewShot,
    GeneratedAdapters,
    MeanAdapter,
    NearestAdapter,
    RandomPrompts,
    choose,
    draws_of,
    titles,
)
from loragen.core.evaluation.targets import Target
from loragen.core.run.checkpoints import load_adapter


def names(contestants):
    return [contestant.name for contestant in contestants]


def equal(one, other):
    return all(torch.equal(one[key], other[key]) for key in one)


def only(contestant, target, targets=()):
    (entry,) = contestant.entries(target, targets)
    return entry


def row(number, prompt=None):
    return Row(prompt=prompt or f"Question {number}?", response=f"answer {number}", line=number)


def target(rows, train_rows=(), prompts=()):
    dataset = Dataset.at("it.jsonl")
    return Target("all", dataset, rows, prompts, "tested rows", train_rows=train_rows)


def test_by_default_all_that_need_no_training():
    assert names(choose([])) == [
        "base", "mean_adapter", "nearest_adapter", "few_shot", "random_prompts", "generated",
    ]  # fmt: skip


def test_named_ones_come_in_the_order_of_the_table_with_those_on_demand():
    assert names(choose(["generated", " base"], ["oracle"])) == ["base", "generated", "oracle"]
    assert names(choose(["multi-task"])) == ["multi_task"]


def test_an_unknown_one_is_refused():
    with pytest.raises(UsageError, match=r"'oracel'\. Did you mean 'oracle'"):
        choose(["oracel"])


def test_the_header_has_the_number_of_shots():
    assert titles(7)["few_shot"] == "7-shot"


def test_known_embeddings_are_not_computed_again(setup, targets, monkeypatch):
    prompts = [one.prompts for one in targets]
    first = setup()
    similarities = first.similarities(prompts[0], prompts)
    second = replace(setup(), embeddings=first.embeddings)
    monkeypatch.delattr(type(second.generator), "embed")
    assert torch.equal(second.similarities(prompts[0], prompts), similarities)
    assert similarities.argmax() == 0


class TestFewShot:
    def test_a_tested_row_is_never_among_its_own_shots(self, setup):
        rows = [row(n) for n in range(5)]
        entry = only(FewShot(setup(shots=3)), target(rows))
        assert entry.adapter is None
        for asked, tested in zip(entry.rows, rows, strict=True):
            assert (asked.prompt, asked.response) == (tested.prompt, tested.response)
            assert len(asked.history) == 3
            assert tested.prompt not in [turn.prompt for turn in asked.history]

    def test_a_row_of_the_train_split_with_the_same_question_is_left_out(self, setup):
        entry = only(FewShot(setup(shots=2)), target([row(1)], [row(1), row(2), row(3)]))
        assert {turn.prompt for turn in entry.rows[0].history} == {"Question 2?", "Question 3?"}

    def test_shots_come_before_the_rows_own_history_and_are_the_same_every_time(self, setup):
        with_history = replace(row(1), history=(Turn("Hello", "Hi"),))
        one, other = (
            only(FewShot(setup(shots=2)), target([with_history], [row(n) for n in range(2, 9)]))
            for _ in range(2)
        )
        assert one.rows == other.rows
        assert one.rows[0].history[-1] == ("Hello", "Hi")

    def test_shots_beyond_the_models_context_are_left_out(self, setup, caplog):
        long = [row(n, "so long " * 8 + str(n)) for n in range(6)]  # 256 positions hold some
        entry = only(FewShot(setup(shots=5)), target(long[:1], long[1:]))
        assert 0 < len(entry.rows[0].history) < 5
        assert "it: 1 rows have fewer than 5 shots" in caplog.text


def test_the_mean_adapter_is_the_mean_of_all_checkpoints(setup, targets):
    shared = setup()
    files = [file for source in shared.sources for file in source.checkpoints]
    entry = only(MeanAdapter(shared), targets[0])
    for key, tensor in entry.adapter.tensors.items():
        expected = torch.stack([load_adapter(file).tensors[key] for file in files]).mean(0)
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-6)


def test_the_nearest_adapter_of_a_training_dataset_is_its_own(setup, targets, collection):
    contestant = NearestAdapter(setup())
    for one in targets:
        trained = read_adapter(collection.runs[one.name] / "adapter")
        assert equal(only(contestant, one).adapter.tensors, trained.tensors)


def test_random_prompts_are_another_datasets(setup, targets):
    shared = setup()
    entry = only(RandomPrompts(shared), targets[0], targets)
    usual = shared.generator.usual_prompts
    foreign = shared.generator.generate(targets[1].prompts[:usual])
    assert equal(entry.adapter.tensors, foreign.tensors)
    alone = only(RandomPrompts(shared), targets[0], targets[:1])  # then of a training dataset
    assert equal(alone.adapter.tensors, foreign.tensors)


class TestGeneratedAdapters:
    def test_one_adapter_for_each_draw_of_prompts(self, setup, targets):
        first, second = GeneratedAdapters(setup()).entries(targets[0], targets)
        assert not equal(first.adapter.tensors, second.adapter.tensors)
        assert first.seconds > 0

    def test_they_can_be_kept(self, setup, targets, tmp_path):
        entries = list(GeneratedAdapters(setup(keep=tmp_path)).entries(targets[0], targets))
        kept = read_adapter(tmp_path / "all" / targets[0].name / "draw-1")
        assert equal(kept.tensors, entries[1].adapter.tensors)

    def test_draws_differ_and_are_the_same_for_the_same_seed(self, setup, targets):
        def draws(**options):
            shared = setup(**options)
            return draws_of(targets[0], shared.generator, shared.options)

        three = draws(draws=3)
        assert len({frozenset(draw) for draw in three}) == 3
        assert three[:2] == draws(draws=2)
        assert three != draws(draws=3, seed=1)

    def test_too_few_prompts_are_a_usage_error(self, setup):
        with pytest.raises(UsageError, match="draws"):
            list(GeneratedAdapters(setup()).entries(target([row(1)], prompts=["One?"]), ()))
