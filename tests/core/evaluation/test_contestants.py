"""Each contestant's own rule."""

from dataclasses import replace

import pytest
import torch

from loragen.core.adapter.files import read_adapter
from loragen.core.data.formats import Turn
from loragen.core.data.rows import Row
from loragen.core.evaluation.contestants import (
    FewShot,
    Generated,
    MeanAdapter,
    NearestAdapter,
    RandomPrompts,
)
from loragen.core.evaluation.targets import Target


def equal(one, other):
    return all(torch.equal(one[key], other[key]) for key in one)


def only(contestant, target, targets=()):
    (entry,) = contestant.entries(target, targets)
    return entry


def row(number, prompt=None):
    return Row(prompt=prompt or f"Question {number}?", response=f"answer {number}", line=number)


def target(rows, train_rows=()):
    return Target("all", "it", "it.jsonl", rows, [], "tested rows", train_rows=train_rows)


def test_centres_that_are_known_are_not_embedded_again(bench, targets, monkeypatch):
    prompts = [one.prompts for one in targets]
    first = bench()
    similarities = first.similarities(prompts[0], prompts)
    told = replace(bench(), centres=first.centres)
    monkeypatch.delattr(type(told.generator), "embed")
    assert torch.equal(told.similarities(prompts[0], prompts), similarities)
    assert similarities.argmax() == 0


class TestFewShot:
    def test_a_tested_row_is_never_among_its_own_shots(self, bench):
        rows = [row(n) for n in range(5)]
        entry = only(FewShot(bench(shots=3)), target(rows))
        assert entry.adapter is None
        for asked, tested in zip(entry.rows, rows, strict=True):
            assert (asked.prompt, asked.response) == (tested.prompt, tested.response)
            assert len(asked.history) == 3
            assert tested.prompt not in [turn.prompt for turn in asked.history]

    def test_a_row_of_the_train_split_with_the_same_question_would_tell_the_answer(self, bench):
        entry = only(FewShot(bench(shots=2)), target([row(1)], [row(1), row(2), row(3)]))
        assert {turn.prompt for turn in entry.rows[0].history} == {"Question 2?", "Question 3?"}

    def test_shots_come_before_the_rows_own_history_and_are_the_same_every_time(self, bench):
        spoken = row(1).model_copy(update={"history": (Turn("Hello", "Hi"),)})
        one, other = (
            only(FewShot(bench(shots=2)), target([spoken], [row(n) for n in range(2, 9)]))
            for _ in range(2)
        )
        assert one.rows == other.rows
        assert one.rows[0].history[-1] == ("Hello", "Hi")

    def test_shots_that_the_model_has_no_room_for_are_left_out(self, bench, caplog):
        long = [row(n, "so long " * 8 + str(n)) for n in range(6)]  # 256 positions hold some
        entry = only(FewShot(bench(shots=5)), target(long[:1], long[1:]))
        assert 0 < len(entry.rows[0].history) < 5
        assert "it: 1 rows have fewer than 5 shots" in caplog.text


def test_the_mean_adapter_is_the_mean_of_all_checkpoints(bench, targets):
    made = bench()
    files = [file for source in made.sources for file in source.checkpoints]
    from loragen.core.run.checkpoints import read_tensors

    entry = only(MeanAdapter(made), targets[0])
    for key, tensor in entry.adapter.tensors.items():
        expected = torch.stack([read_tensors(file)[key] for file in files]).mean(0)
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-6)


def test_the_nearest_adapter_of_a_training_dataset_is_its_own(bench, targets, collection):
    contestant = NearestAdapter(bench())
    for one in targets:
        trained = read_adapter(collection.runs[one.name] / "adapter")
        assert equal(only(contestant, one).adapter.tensors, trained.tensors)


def test_random_prompts_are_another_datasets(bench, targets):
    made = bench()
    entry = only(RandomPrompts(made), targets[0], targets)
    usual = made.generator.usual_prompts
    foreign = made.generator.generate(targets[1].prompts[:usual])
    assert equal(entry.adapter.tensors, foreign.tensors)
    alone = only(RandomPrompts(made), targets[0], targets[:1])  # then of a training dataset
    assert equal(alone.adapter.tensors, foreign.tensors)


class TestGenerated:
    def test_one_adapter_for_each_draw_of_prompts(self, bench, targets):
        first, second = Generated(bench()).entries(targets[0], targets)
        assert not equal(first.adapter.tensors, second.adapter.tensors)
        assert first.seconds > 0

    def test_they_can_be_kept(self, bench, targets, tmp_path):
        entries = list(Generated(bench(keep=tmp_path)).entries(targets[0], targets))
        kept = read_adapter(tmp_path / "all" / targets[0].name / "draw-1")
        assert equal(kept.tensors, entries[1].adapter.tensors)

    def test_draws_take_other_prompts_and_the_same_ones_for_the_same_seed(self, bench, targets):
        draws = bench(draws=3).draws(targets[0])
        assert len({frozenset(draw) for draw in draws}) == 3
        assert draws[:2] == bench(draws=2).draws(targets[0])
        assert draws != bench(draws=3, seed=1).draws(targets[0])

    def test_too_few_prompts_are_a_usage_error(self, bench):
        from loragen.core.errors import UsageError

        with pytest.raises(UsageError, match="draws"):
            bench().draws(target([row(1)]))
