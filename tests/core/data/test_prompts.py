import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loragen.core.data.prompts import joined, prompts_of_rows, random_groups, read_prompts
from loragen.core.errors import DataError, UsageError

prompts = st.lists(st.text("abc ", min_size=1), max_size=30)
sizes = st.integers(1, 7)


def written(tmp_path, name, text):
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    return file


def test_a_text_file_has_a_prompt_a_line(tmp_path):
    file = written(tmp_path, "p.txt", "\ufefffirst\r\n\n  second  \n")
    assert read_prompts(file) == ["first", "second"]


@pytest.mark.parametrize("name", ["p.jsonl", "p.json"])
def test_json_has_texts_or_objects_with_a_prompt(tmp_path, name):
    """So a file of labelled rows will do; the labels are not read."""
    documents = ["first", {"prompt": "second\nline", "response": 3, "anything": None}]
    lines = "\n".join(map(json.dumps, documents))
    text = json.dumps(documents) if name == "p.json" else lines
    assert read_prompts(written(tmp_path, name, text)) == ["first", "second\nline"]


@pytest.mark.parametrize(
    "line, reason",
    [
        ("3", r"expected a text or an object with a 'prompt' \(or a row\), found int 3"),
        ('{"text": "x"}', "found keys text"),
        ('{"prompt": 3}', "'prompt': expected a text, found int 3"),
        ("{", "not JSON"),
    ],
)
def test_a_malformed_prompt_is_one_line_with_its_place(tmp_path, line, reason):
    file = written(tmp_path, "p.jsonl", f'"good"\n{line}\n')
    with pytest.raises(DataError, match=reason) as error:
        read_prompts(file)
    assert str(error.value).startswith(f"{file}:2: ")


@pytest.mark.parametrize("name, text", [("p.txt", "\n \n"), ("p.jsonl", ""), ("p.json", "[]")])
def test_a_file_without_prompts_is_refused(tmp_path, name, text):
    with pytest.raises(DataError, match="no prompts in it"):
        read_prompts(written(tmp_path, name, text))


def test_a_missing_file_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="no such prompt file"):
        read_prompts(tmp_path / "none.txt")


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_what_is_not_utf_8_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"\xff\xfeabc")
    with pytest.raises(DataError, match="not UTF-8 text"):
        read_prompts(tmp_path / name)


def test_joined_keeps_the_order():
    assert joined(["a", "b", "c"], 2) == ["a\n\nb", "c"]
    assert joined(["a", "b"], 1) == ["a", "b"]
    assert joined([], 3) == []


@given(prompts, sizes)
def test_joined_loses_nothing(prompts, size):
    texts = joined(prompts, size)
    assert "\n\n".join(texts) == "\n\n".join(prompts)
    assert len(texts) == -(-len(prompts) // size)


@given(st.integers(0, 40), sizes, st.integers(0, 99))
def test_no_prompt_is_in_two_groups_and_every_group_is_whole(count, size, seed):
    names = [f"prompt {i}" for i in range(count)]
    groups = random_groups(names, size, seed)
    members = Counter(member for group in groups for member in group)
    assert set(members.values()) <= {1}
    assert members.keys() <= set(names)
    if count >= size:
        assert {len(group) for group in groups} == {size}
        assert count - len(members) < size
    elif count:
        assert [sorted(group) for group in groups] == [sorted(names)]
    assert groups == random_groups(names, size, seed)


def test_groups_are_drawn_at_random():
    names = [str(i) for i in range(40)]
    assert random_groups(names, 4, 1) != random_groups(names, 4, 2)
    assert random_groups(names, 4, 1)[0] != tuple(names[:4])


def test_rows_of_every_format_have_prompts(tmp_path):
    documents = [
        {"instruction": "a", "input": "b", "output": "x"},
        {"messages": [{"role": "user", "content": "c"}]},
        {"question": "d", "choices": ["x", "y"]},
    ]
    file = written(tmp_path, "p.json", json.dumps(documents))
    assert read_prompts(file) == ["a\n\nb", "c", "d\nA: x\nB: y"]
    assert read_prompts(written(tmp_path, "p.csv", "prompt,n\na,1\nb,2\n")) == ["a", "b"]


def test_bad_rows_are_all_reported_or_left_out(tmp_path):
    file = written(tmp_path, "p.jsonl", '"good"\n3\n{\n')
    with pytest.raises(DataError) as error:
        read_prompts(file)
    assert len(error.value.problems) == 2
    assert "--skip-bad-rows" not in str(error.value)  # which no command with prompts has
    assert prompts_of_rows(file, skip_bad_rows=True) == ["good"]


@pytest.mark.parametrize("name", ["p.ndjson", "p.data", "p"])
def test_only_a_txt_has_lines_of_text(tmp_path, name):
    """Any other file is read as training reads it, whatever its name."""
    row = {"prompt": "a", "response": "secret"}
    assert read_prompts(written(tmp_path, name, json.dumps(row))) == ["a"]
    file = written(tmp_path, name, "a text\n")
    with pytest.raises(DataError, match=r":1: not JSON: .* \(text, a prompt a line, is a \.txt\)"):
        read_prompts(file)
