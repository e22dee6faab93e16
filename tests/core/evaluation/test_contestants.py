"""Each contestant's own rule, and which of them take part."""

from dataclasses import replace

import pytest
import torch

from loragen.core.adapter.files import read_adapter
from loragen.core.data.dataset import Dataset, Row
from loragen.core.data.formats import Turn
from loragen.core.errors import UsageError
from loragen.core.evaluation.contestants import (
    BestSingle,
    FewShot,
    GeneratedAdapters,
    GibberishPrompts,
    MeanAdapter,
    NearestAdapter,
    OtherPrompts,
    RidgeRegression,
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


def test_by_default_all_that_are_cheap():
    assert names(choose([])) == [
        "base", "few_shot", "mean", "nearest", "ridge", "arrow", "generated", "other_prompts",
        "gibberish_prompts",
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
    first = setup()
    known = first.mean_embedding(targets[0].prompts)
    second = replace(setup(), embeddings=first.embeddings)
    monkeypatch.delattr(type(second.generator), "text_encoder")
    assert second.mean_embedding(targets[0].prompts) is known


def test_the_mean_embedding_is_of_all_prompts(setup, targets):
    """In pieces of any size; the last prompts count like the first."""
    prompts = targets[0].prompts
    own = setup().mean_embedding(prompts)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("loragen.core.generator.embeddings.TEXTS_AT_ONCE", 2)
        assert setup().mean_embedding(prompts) == pytest.approx(own, abs=1e-6)
    changed = [*prompts[:-1], "another last prompt altogether"]
    assert setup().mean_embedding(changed) != pytest.approx(own, abs=1e-6)


def test_the_generators_file_knows_the_embeddings_of_its_training_datasets(setup):
    known = setup().source_embeddings()
    unknown = setup()
    unknown.generator.familiarity = None
    assert known.shape == (2, 16)
    assert unknown.source_embeddings() == pytest.approx(known, abs=0.1)  # texts join other prompts


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


class TestRidgeRegression:
    def test_its_adapter_is_a_blend_of_the_collected_ones(self, setup, targets):
        shared = setup()
        contestant = RidgeRegression(shared)
        tensors = only(contestant, targets[0]).adapter.tensors
        own = shared.mean_embedding(targets[0].prompts)
        weights = contestant.regression.coefficients(own)
        assert weights.sum() == pytest.approx(1)
        for key, tensor in tensors.items():
            parts = [shared.collected(index).tensors[key] for index in range(2)]
            blend = sum(w * part for w, part in zip(weights.tolist(), parts, strict=True))
            torch.testing.assert_close(tensor, blend)

    def test_adapters_are_read_in_blocks(self, setup, monkeypatch):
        whole = RidgeRegression(setup()).regression
        monkeypatch.setattr("loragen.core.evaluation.contestants.LOADED_BYTES", 1)
        assert RidgeRegression(setup()).regression.penalty == whole.penalty


def test_best_single_enters_every_collected_adapter_the_nearest_as_seeded(setup, targets):
    for tested in targets:
        entries = list(BestSingle(setup()).entries(tested, targets))
        assert len(entries) == 2
        assert not equal(entries[0].adapter.tensors, entries[1].adapter.tensors)
        (seeded,) = [entry for entry in entries if entry.seeded]
        nearest = only(NearestAdapter(setup()), tested)
        assert equal(seeded.adapter.tensors, nearest.adapter.tensors)


def test_other_prompts_are_another_datasets(setup, targets):
    shared = setup(draws=3)
    read = []
    shared.generator.generate = lambda prompts: read.append(prompts)
    for among in (targets, targets[:1]):  # the others are tested datasets, or training datasets
        list(OtherPrompts(shared).entries(targets[0], among))
        assert len(read) == 3
        for prompts in read:
            assert set(prompts) <= set(targets[1].prompts)
            assert len(prompts) == len(draws_of(targets[0], shared.generator, shared.options)[0])
        first, read[:] = read[:], []
        list(OtherPrompts(shared).entries(targets[0], among))
        assert read == first
        read.clear()


def test_gibberish_has_the_shape_of_the_prompts_and_none_of_their_words(setup, targets):
    shared = setup()
    read = []
    shared.generator.generate = lambda prompts: read.append(prompts)
    list(GibberishPrompts(shared).entries(targets[0], targets))
    draws = draws_of(targets[0], shared.generator, shared.options)
    assert [list(map(len, prompts)) for prompts in read] == [list(map(len, d)) for d in draws]
    for nonsense, prompts in zip(read, draws, strict=True):
        assert not set(" ".join(nonsense).split()) & set(" ".join(prompts).split())
        assert [one[-1] for one in nonsense] == [one[-1] for one in prompts] == ["?"] * len(prompts)


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
