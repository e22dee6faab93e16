import json

import pytest

from loragen.core.data.rows import dataset_names, find_dataset, read_rows
from loragen.core.errors import DataError, UsageError

GOOD = '{"prompt": "p", "response": "r"}'


@pytest.fixture
def file(tmp_path):
    """`file(text, name)` writes exactly these bytes."""

    def write(content, name="d.jsonl"):
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return write


def test_rows_know_their_line_and_skip_empty_ones(file):
    first, second = read_rows(file(f"{GOOD}\n\n  \n" + '{"prompt":"ä","response":"ö","x":1}'))
    assert (first.prompt, first.response, first.system, first.line) == ("p", "r", None, 1)
    assert (second.prompt, second.response, second.line) == ("ä", "ö", 4)


def test_system_and_choices_are_kept(file):
    document = {"prompt": "p", "response": "a", "system": "s", "choices": ["a", "b"]}
    (row,) = read_rows(file(json.dumps(document)))
    assert (row.system, row.choices) == ("s", ["a", "b"])


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.txt"])
def test_a_byte_order_mark_is_no_text(file, name):
    text = f"[{GOOD}]" if name == "d.json" else GOOD
    (row,) = read_rows(file(b"\xef\xbb\xbf" + text.encode(), name))
    assert row.prompt == "p"


def test_windows_line_ends_are_line_ends(file):
    rows = read_rows(file(f"{GOOD}\r\n{GOOD}\r\n"))
    assert [(row.response, row.line) for row in rows] == [("r", 1), ("r", 2)]


def test_a_line_separator_inside_a_text_is_no_line_end(file):
    (row,) = read_rows(file('{"prompt": "a\u2028b\x85c", "response": "r"}'))
    assert row.prompt == "a\u2028b\x85c"


def test_a_json_list_counts_its_items(file):
    rows = read_rows(file(f"[{GOOD},\n\n{GOOD}]", "d.json"))
    assert [row.line for row in rows] == [1, 2]


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"prompt": "p"', "not JSON: .* at column"),
        ("p -> r", "not JSON: Expecting value at column 1"),
        ("[1, 2]", "expected an object, found list"),
        ('"text"', "expected an object, found str"),
        ("null", "expected an object, found NoneType"),
        ('{"question": "p", "response": "r"}', "'prompt': field required .keys here: question, re"),
        ('{"prompt": "p"}', "'response': field required .keys here: prompt"),
        ('{"prompt": 3, "response": "r"}', "'prompt': input should be a valid string"),
        ('{"prompt": "p", "response": null}', "'response': input should be a valid string"),
        ('{"prompt": "p", "response": ["r"]}', "'response': input should be a valid string"),
        ('{"prompt": "p", "response": " "}', "'response' is empty"),
        ('{"prompt": "p", "response": "r", "system": 1}', "'system': input should be"),
        ('{"prompt": "p", "response": "r", "choices": "ab"}', "'choices': input should be"),
    ],
)
def test_a_malformed_row_is_one_line_with_its_place(file, line, reason):
    path = file(f"{GOOD}\n\n{line}\n{GOOD}")
    with pytest.raises(DataError, match=reason) as error:
        read_rows(path)
    assert str(error.value).startswith(f"{path}:3: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content, name, reason",
    [
        ("", "d.jsonl", "no rows in it"),
        ("\n \n", "d.jsonl", "no rows in it"),
        ("[]", "d.json", "no rows in it"),
        ("{}", "d.json", ":1: expected a list of rows, found dict"),
        ("[\n{]", "d.json", ":2: not JSON"),
        (b"\xff\xfe\x00", "d.jsonl", "not UTF-8 text"),
        (f"[{GOOD}, 3]", "d.json", ":2: expected an object, found int"),
    ],
)
def test_a_file_that_holds_no_rows_is_one_line(file, content, name, reason):
    path = file(content, name)
    with pytest.raises(DataError, match=reason) as error:
        read_rows(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_a_missing_file_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        read_rows(tmp_path / "none.jsonl")


@pytest.fixture
def root(tmp_path):
    for name in ("arc-easy", "boolq"):
        for split in ("train", "test"):
            folder = tmp_path / "cs" / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}_{split}_formatted.jsonl").write_text(GOOD, encoding="utf-8")
    (tmp_path / "cs" / "empty").mkdir()
    return tmp_path / "cs"


def test_a_dataset_by_name(root):
    assert find_dataset("boolq", root) == ("boolq", root / "boolq/boolq_train_formatted.jsonl")
    name, file = find_dataset("boolq", root, split="test")
    assert (name, file.name) == ("boolq", "boolq_test_formatted.jsonl")
    assert dataset_names(root) == ["arc-easy", "boolq"]


@pytest.mark.parametrize(
    "path, name",
    [
        ("my.jsonl", "my"),
        ("my.json", "my"),
        ("arc_train_formatted.jsonl", "arc"),
        ("arc_test.jsonl", "arc"),
        ("colors/train.jsonl", "colors"),
        ("colors/val.json", "colors"),
        ("v1.5.jsonl", "v1.5"),
    ],
)
def test_a_dataset_by_file_is_named_after_it(tmp_path, path, name):
    file = tmp_path / path
    file.parent.mkdir(exist_ok=True)
    file.touch()
    assert find_dataset(str(file), tmp_path / "nowhere") == (name, file)


@pytest.mark.parametrize(
    "wanted, message",
    [
        ("bolq", r"unknown dataset 'bolq'\. Did you mean 'boolq'\? In .*: arc-easy, boolq"),
        ("xyz", r"unknown dataset 'xyz'\. In .*: arc-easy, boolq"),
        ("empty", r"unknown dataset 'empty'\."),
        ("none.jsonl", r"none\.jsonl: no such file"),
    ],
)
def test_a_dataset_that_is_not_there_names_what_is(root, wanted, message):
    with pytest.raises(UsageError, match=message):
        find_dataset(wanted, root)


def test_a_root_that_is_not_there_is_said_so(tmp_path):
    with pytest.raises(UsageError, match="is not a directory; see --data-root"):
        find_dataset("boolq", tmp_path / "none")


def test_the_real_data_is_read(shared):
    root = shared / "data_to_lora" / "cs"
    assert "arc-challenge" in dataset_names(root)
    for name in dataset_names(root):
        rows = read_rows(find_dataset(name, root, "test")[1])
        assert rows
        assert all(row.prompt and row.response.startswith("[") for row in rows)
