import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loragen.core.data.prompts import PromptGroups
from loragen.core.errors import UsageError
from loragen.core.learning.sources import TrainingSource
from loragen.core.learning.texts import has_rows, labelled_rows, split_groups
from tests.conftest import rows_of, write_lines


def source(rows, groups=None):
    """A dataset of which only the labels are asked for."""
    return TrainingSource("colors", [], [], {}, "base", groups, rows=str(rows) if rows else None)


@pytest.fixture
def labelled(tokenizer):
    """`labelled(file, held-out texts)` with plain defaults."""

    def make(file, validation=(), max_length=64, seed=1):
        return labelled_rows(source(file), validation, tokenizer, max_length, seed)

    return make


@pytest.fixture
def told(tokenizer):
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
    tmp_path, labelled, told, numbers, size, ratio, seed
):
    """However prompts are grouped, also where several rows have one prompt, spaced otherwise."""
    prompts = [f"Question{' ' * (1 + i % 2)}{n}?" for i, n in enumerate(numbers)]
    documents = [{"prompt": prompt, "response": "red"} for prompt in prompts]
    file = write_lines(tmp_path / "rows.jsonl", documents)
    groups: PromptGroups = split_groups(prompts, size, ratio, seed)
    held = [prompt for group in groups.val for prompt in group]
    numbers_of = {prompt.split()[1] for prompt in held}
    free = [prompt for prompt in prompts if prompt.split()[1] not in numbers_of]
    if not free:
        with pytest.raises(UsageError, match=r"no row is left to learn from; lower data\.val"):
            labelled(file, held)
        return
    found = labelled(file, held)
    assert len(found.training) == len(free)
    assert len(found.training) + len(found.held_out) == len(prompts)
    assert not any(number in text for text in told(found.training) for number in numbers_of)
    assert all(any(n in text for n in numbers_of) for text in told(found.held_out))


def test_rows_are_those_of_the_file_in_an_order_of_the_seed(tmp_path, labelled, told):
    file = write_lines(tmp_path / "rows.jsonl", rows_of(["red", "green"]))
    one, again, other = labelled(file), labelled(file), labelled(file, seed=2)
    assert one == again != other
    assert told(one.training) == told(other.training)
    assert len(one.training) == 12
    assert one.held_out == []


def test_answers_that_do_not_fit_are_left_out(tmp_path, labelled):
    rows = [{"prompt": f"q{i}", "response": "red" * (1 + 20 * (i % 2))} for i in range(6)]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    found = labelled(file, max_length=16)
    assert len(found.training) == 3
    assert all(len(example.ids) <= 16 for example in found.training)
    with pytest.raises(UsageError, match=r"colors: no answer fits into 2 .* behaviour\.max_length"):
        labelled(file, max_length=2)


def test_of_a_large_dataset_a_sample_is_taken(tmp_path, labelled, monkeypatch):
    monkeypatch.setattr("loragen.core.learning.texts.MOST_ROWS", 5)
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
    assert has_rows(source(file)) is there


def test_labels_that_are_not_known_or_gone(tmp_path, labelled, tokenizer):
    assert not has_rows(source(None))
    assert not has_rows(source(tmp_path / "gone.jsonl"))
    with pytest.raises(UsageError, match=r"gone\.jsonl is gone; behaviour needs its labels"):
        labelled(tmp_path / "gone.jsonl")
    with pytest.raises(UsageError, match="colors: no labelled rows are known of it"):
        labelled_rows(source(None), [], tokenizer, 64, 1)
