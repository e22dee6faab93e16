import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loragen.core.config.schema import GenDataSection, SourceSection
from loragen.core.data.dataset import Dataset, Row
from loragen.core.data.prompts import text_key
from loragen.core.errors import DataError, UsageError
from loragen.core.learning.sources import TrainingSource
from loragen.core.learning.texts import (
    labelled_rows,
    last_prompts,
    paired_with_rows,
    texts_of,
)
from loragen.core.lora.provenance import Provenance
from tests.conftest import rows_of, write_lines


def trained(rows=20, batch_size=4, seed=1):
    made = [Row(prompt=f"prompt {i}", response="x", line=i + 1) for i in range(rows)]
    return Provenance(made, batch_size, seed)


def prompts_of(provenance, step):
    return [row.prompt for row in provenance.rows_of(step)]


def with_prompts(prompts, size, ratio, seed):
    data = GenDataSection(samples_per_prompt=size, val_ratio=ratio)
    source = TrainingSource("x", [], Path(), SourceSection(run="x"), data, seed)
    source.prompts = prompts
    return source


class TestTexts:
    @given(st.integers(1, 40), st.integers(1, 5), st.floats(0, 0.99), st.integers(0, 9))
    def test_held_out_texts_share_no_prompt_with_the_others(self, count, size, ratio, seed):
        source = with_prompts([f"p{i}" for i in range(count)], size, ratio, seed)
        groups = source.groups
        assert groups.train, "a source must keep texts to train on"
        train, val = ({p for group in side for p in group} for side in (groups.train, groups.val))
        assert not train & val
        texts = texts_of(source)
        assert texts.tracked is None
        held = [texts.texts[i] for i in texts.val_texts]
        assert held == ["\n\n".join(group) for group in groups.val]
        assert len(texts.texts) == len(groups.train) + len(groups.val)


class TestLastPrompts:
    def test_those_of_the_step_come_first_then_those_of_the_steps_before(self):
        run = trained(rows=40)
        assert last_prompts(run, 5, 4) == prompts_of(run, 5)
        assert last_prompts(run, 5, 3) == prompts_of(run, 5)[:3]
        assert last_prompts(run, 5, 8) == [*prompts_of(run, 5), *prompts_of(run, 4)]

    @given(
        st.integers(1, 12), st.integers(1, 9), st.integers(1, 8), st.integers(1, 30),
        st.sets(st.integers(0, 11)),
    )  # fmt: skip
    def test_they_differ_and_none_is_held_out(self, rows, batch_size, step, count, held):
        run = trained(rows, batch_size)
        excluded = {f"prompt {i}" for i in held}
        found = last_prompts(run, step, count, excluded)
        assert len(set(found)) == len(found) <= count
        past = {p for s in range(1, step + 1) for p in prompts_of(run, s)} - excluded
        assert set(found) <= past
        assert len(found) == min(count, len(past))


class TestPairedWithRows:
    def paired(self, run, steps, held_out=(), size=2, most=2):
        return paired_with_rows(
            "x", run, steps, held_out, samples_per_prompt=size, max_texts=most
        )  # fmt: skip

    def test_each_checkpoint_has_the_texts_of_its_own_step(self):
        run = trained()
        texts = self.paired(run, [3, 4])
        for step, tracked in zip((3, 4), texts.tracked, strict=True):
            prompts = prompts_of(run, step)
            assert [texts.texts[i] for i in tracked] == [
                "\n\n".join(prompts[:2]),
                "\n\n".join(prompts[2:]),
            ]

    def test_a_text_that_checkpoints_share_is_embedded_once(self):
        texts = self.paired(trained(rows=40), [3, 4, 5], most=4)
        assert len(texts.texts) == len(set(texts.texts)) == 8  # of steps 2 to 5
        assert sum(map(len, texts.tracked)) == 12

    def test_too_few_rows_make_one_shorter_text(self):
        texts = self.paired(trained(rows=3, batch_size=3), [1], size=4)
        assert [len(texts.texts[i].split("\n\n")) for i in texts.tracked[0]] == [3]

    @given(st.sets(st.integers(0, 19), max_size=19), st.integers(1, 5), st.integers(1, 9))
    def test_no_row_of_a_held_out_text_is_paired(self, held, size, most):
        groups = [(f"prompt  {i}",) for i in sorted(held)]  # spaced otherwise, and the same
        texts = self.paired(trained(), [6, 7, 8], groups, size, most)
        drawn = {i for tracked in texts.tracked for i in tracked}
        assert drawn.isdisjoint(texts.val_texts)
        assert len(texts.val_texts) == len(groups)
        prompts = {text_key(p) for i in drawn for p in texts.texts[i].split("\n\n")}
        assert prompts.isdisjoint(f"prompt {i}" for i in held)

    def test_a_checkpoint_without_rows_is_refused(self):
        everything = [tuple(row.prompt for row in trained().rows)]
        with pytest.raises(DataError, match=r"x: no row up to step 2 is left .* data\.val_ratio"):
            self.paired(trained(), [2], everything)


def source(rows):
    """A source of which only the labels matter."""
    labels = Dataset.at(str(rows)) if rows else None
    return TrainingSource(
        "colors", [], Path(), SourceSection(run="x"), GenDataSection(), 1, labels=labels
    )


@pytest.fixture
def labelled(tokenizer):
    """`labelled(file, held-out texts)` with plain defaults."""

    def make(file, validation=(), max_length=64, seed=1):
        return labelled_rows(source(file), validation, tokenizer, max_length, seed)

    return make


@pytest.fixture
def decoded(tokenizer):
    """What rows in tokens say, in no order."""

    def read(examples):
        return sorted(tokenizer.decode(example.ids) for example in examples)

    return read


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    numbers=st.lists(st.integers(0, 9), min_size=6, max_size=20),
    size=st.integers(1, 3),
    ratio=st.floats(0.1, 0.6),
    seed=st.integers(0, 99),
)
def test_no_row_of_a_held_out_text_is_learned_from(
    tmp_path, labelled, decoded, numbers, size, ratio, seed
):
    """However prompts are grouped, also where several rows have one prompt, spaced otherwise."""
    prompts = [f"Question{' ' * (1 + i % 2)}{n}?" for i, n in enumerate(numbers)]
    documents = [{"prompt": prompt, "response": "red"} for prompt in prompts]
    file = write_lines(tmp_path / "rows.jsonl", documents)
    groups = with_prompts(prompts, size, ratio, seed).groups
    held = [prompt for group in groups.val for prompt in group]
    numbers_of = {prompt.split()[1] for prompt in held}
    free = [prompt for prompt in prompts if prompt.split()[1] not in numbers_of]
    if not free:
        with pytest.raises(UsageError, match=r"no row is left to learn from; lower data\.val"):
            labelled(file, held)
        return
    found = labelled(file, held)
    assert len(found.training) == len(free)
    assert len(found.training) + len(found.validation) == len(prompts)
    assert not any(number in text for text in decoded(found.training) for number in numbers_of)
    assert all(any(n in text for n in numbers_of) for text in decoded(found.validation))


def test_rows_are_those_of_the_file_in_an_order_of_the_seed(tmp_path, labelled, decoded):
    file = write_lines(tmp_path / "rows.jsonl", rows_of(["red", "green"]))
    one, again, other = labelled(file), labelled(file), labelled(file, seed=2)
    assert list(one.training) == list(again.training) != list(other.training)
    assert one.sha256 == again.sha256 != other.sha256
    assert decoded(one.training) == decoded(other.training)
    assert len(one.training) == 12
    assert not one.validation


def test_answers_that_do_not_fit_are_left_out(tmp_path, labelled):
    rows = [{"prompt": f"q{i}", "response": "red" * (1 + 20 * (i % 2))} for i in range(6)]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    found = labelled(file, max_length=16)
    assert len(found.training) == 3
    assert all(len(example.ids) <= 16 for example in found.training)
    with pytest.raises(UsageError, match=r"colors: no answer fits into 2 .* behaviour\.max_length"):
        labelled(file, max_length=2)


def test_of_a_large_dataset_a_sample_is_taken(tmp_path, labelled, monkeypatch):
    monkeypatch.setattr("loragen.core.learning.texts.MAX_ROWS", 5)
    file = write_lines(tmp_path / "rows.jsonl", rows_of(["red"]))
    assert len(labelled(file).training) == 5


@pytest.mark.parametrize(
    ("name", "text", "there"),
    [
        ("rows.jsonl", json.dumps({"prompt": "q", "response": "a"}), True),
        ("some.jsonl", '{"prompt": "q"}\n{"prompt": "q", "response": "a"}\n', True),
        ("prompts.txt", "What is it?\nAnd this?\n", False),
        ("prompts.jsonl", '{"prompt": "What is it?"}\n' * 2, False),
        ("empty.jsonl", "", False),
    ],
)
def test_whether_there_are_labels(tmp_path, name, text, there):
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    assert source(file).has_labels is there


def test_labels_that_are_not_known_or_gone(tmp_path, labelled, tokenizer):
    assert not source(None).has_labels
    assert not source(tmp_path / "gone.jsonl").has_labels
    with pytest.raises(UsageError, match=r"gone\.jsonl is missing"):
        labelled(tmp_path / "gone.jsonl")
    with pytest.raises(UsageError, match="colors: its labelled rows are unknown"):
        labelled_rows(source(None), [], tokenizer, 64, 1)
