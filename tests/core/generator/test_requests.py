import pytest
from hypothesis import given
from hypothesis import strategies as st

from loragen.core.errors import DataError, UsageError
from loragen.core.generator.requests import Request, file_names, requests

ROWS = [
    {"prompt": "red?", "response": "yes", "dataset": "colors"},
    {"prompt": "cat?", "dataset": "animals / wild"},
    {"prompt": "blue?", "dataset": "colors"},
]


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo\n", encoding="utf-8")
    return file


def test_all_prompts_make_one_adapter(text):
    assert requests(["zero", " "], [text], None, None) == [Request("", ["zero", "one", "two"])]
    assert requests(["zero"], [text, text], None, 3) == [Request("", ["zero", "one", "two"])]


def test_an_adapter_for_each_line(text):
    asked = requests(["zero"], [text], "line", 2)
    assert asked == [Request("prompt-001", ["zero"]), Request("prompt-002", ["one"])]


def test_an_adapter_for_each_value_of_a_field(dataset):
    asked = requests((), [dataset(ROWS)], "dataset", None)
    assert asked == [Request("colors", ["red?", "blue?"]), Request("animals-wild", ["cat?"])]


def test_a_prepared_line_has_several_prompts(dataset):
    line = {"prompt": "a\n\nb", "prompts": ["a", "b"], "dataset": "letters", "lines": [1, 2]}
    assert requests((), [dataset([line])], "dataset", None) == [Request("letters", ["a", "b"])]


def test_a_field_that_is_not_there_is_told_with_its_line(dataset):
    with pytest.raises(DataError, match=r"colors\.jsonl:2: .* field 'dataset'; .*: prompt$"):
        requests((), [dataset([ROWS[0], {"prompt": "x"}])], "dataset", None)


def test_fields_need_rows(text):
    with pytest.raises(UsageError, match="this is text"):
        requests((), [text], "dataset", None)
    with pytest.raises(UsageError, match="give --prompt-file"):
        requests(["x"], [], "dataset", None)


@pytest.mark.parametrize("per", [None, "line"])
def test_no_prompts_are_refused(per):
    with pytest.raises(UsageError, match=r"no prompts: give --prompt TEXT"):
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
