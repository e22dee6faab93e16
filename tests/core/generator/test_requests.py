import pytest
from hypothesis import given
from hypothesis import strategies as st

from loragen.core.data.documents import DataFile
from loragen.core.errors import DataError, UsageError
from loragen.core.generator.requests import (
    Request,
    draw_prompts,
    file_names,
    nonempty_prompts,
    requests,
)

ROWS = [
    {"prompt": "red?", "response": "yes", "dataset": "colors"},
    {"prompt": "cat?", "dataset": "animals / wild"},
    {"prompt": "blue?", "dataset": "colors"},
]


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo\n", encoding="utf-8")
    return DataFile(file)


def test_all_prompts_make_one_adapter(text):
    assert requests(["zero", " "], [text], None, None) == [Request("", ["zero", "one", "two"])]
    assert requests(["zero"], [text, text], None, 3) == [Request("", ["zero", "one", "two"])]


def test_an_adapter_for_each_line(text):
    result = requests(["zero"], [text], "line", 2)
    assert result == [Request("prompt-001", ["zero"]), Request("prompt-002", ["one"])]


def test_an_adapter_for_each_value_of_a_field(dataset):
    result = requests((), [DataFile(dataset(ROWS))], "dataset", None)
    assert result == [Request("colors", ["red?", "blue?"]), Request("animals-wild", ["cat?"])]


def test_a_prepared_line_has_several_prompts(dataset):
    line = {"prompt": "a\n\nb", "prompts": ["a", "b"], "dataset": "letters", "lines": [1, 2]}
    source = DataFile(dataset([line]))
    assert requests((), [source], "dataset", None) == [Request("letters", ["a", "b"])]


def test_a_missing_field_is_an_error_with_its_line(dataset):
    with pytest.raises(DataError, match=r"colors\.jsonl:2: .*'dataset'"):
        requests((), [DataFile(dataset([ROWS[0], {"prompt": "x"}]))], "dataset", None)


def test_fields_need_rows(text):
    with pytest.raises(UsageError, match="needs rows"):
        requests((), [text], "dataset", None)
    with pytest.raises(UsageError, match="--prompt-file"):
        requests(["x"], [], "dataset", None)


@pytest.mark.parametrize("per", [None, "line"])
def test_no_prompts_are_refused(per):
    with pytest.raises(UsageError, match="--prompt"):
        requests([" "], [], per, None)


@given(labels=st.lists(st.text(min_size=1), unique=True))
def test_names_are_good_for_files_and_differ(labels):
    names = file_names(labels)
    assert len({name.casefold() for name in names}) == len(labels)
    assert all(name and not set(name) & set('/\\:*?"<>| ') for name in names)
    assert not any(name.startswith(".") for name in names)


def test_names_that_a_file_system_or_the_output_would_take_for_another():
    labels = ["Nul", "a:b", "A b", "v1.5", "weights.PT", "m.bin", "x" * 300, "x" * 301]
    names = ["_Nul", "a-b", "A-b-2", "v1.5", "weights-PT", "m-bin", "x" * 120, "x" * 120 + "-2"]
    assert file_names(labels) == names


PROMPTS = [f"prompt {i}" for i in range(20)]


def test_by_default_all_prompts_are_read_at_once():
    assert draw_prompts(PROMPTS, 1, None, 0, usual=8) == [PROMPTS]


@given(draws=st.integers(1, 9), size=st.integers(1, 19), seed=st.integers(0, 99))
def test_draws_are_different_prompts_in_their_order(draws, size, seed):
    drawn = draw_prompts(PROMPTS, draws, size, seed, usual=8)
    assert len(drawn) == draws
    for draw in drawn:
        assert len(set(draw)) == size
        assert draw == [prompt for prompt in PROMPTS if prompt in draw]
    assert draw_prompts(PROMPTS, draws + 1, size, seed, usual=8)[:draws] == drawn


def test_a_draw_has_as_many_prompts_as_in_training_and_at_most_half():
    assert len(draw_prompts(PROMPTS, 2, None, 0, usual=8)[0]) == 8
    assert len(draw_prompts(PROMPTS, 2, None, 0, usual=64)[0]) == 10


def test_another_seed_draws_others():
    one, other = (draw_prompts(PROMPTS, 3, 5, seed, usual=8) for seed in (0, 1))
    assert one != other


@pytest.mark.parametrize("prompts, size", [(PROMPTS, 20), (PROMPTS, 30), (PROMPTS[:1], None)])
def test_draws_that_could_not_differ_are_refused(prompts, size):
    with pytest.raises(UsageError, match=rf"{len(prompts)}$"):
        draw_prompts(prompts, 3, size, 0, usual=8)


def test_prompts_without_text_are_left_out():
    assert nonempty_prompts(["a", " ", "b"]) == ["a", "b"]
    assert nonempty_prompts("one prompt") == ["one prompt"]
    for empty in ([], ["", "\n"], " "):
        with pytest.raises(UsageError, match="no prompts"):
            nonempty_prompts(empty)
