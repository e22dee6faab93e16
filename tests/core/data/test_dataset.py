import json
from pathlib import Path

import pytest

from loragen.core.data.dataset import (
    Dataset,
    Row,
    allowed_answers,
    closed_answers,
    dataset_names,
)
from loragen.core.errors import DataError, UsageError
from loragen.core.files import sha256

from .writers import FILES

LABELLED = {"prompt": "a?", "response": "b"}
PREPARED = {"prompt": "p\n\nq", "prompts": ["p", "q"], "dataset": "d", "lines": [1, 2]}


@pytest.fixture
def reads(monkeypatch):
    """The names of the files that were read, in their order."""
    opened = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda f: opened.append(f.name) or read_bytes(f))
    return opened


@pytest.mark.parametrize("suffix", FILES)
def test_one_read_gives_everything(tmp_path, reads, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    file = tmp_path / f"d{suffix}"
    FILES[suffix](file, [LABELLED, LABELLED])
    dataset = Dataset.find(str(file), tmp_path)
    assert (dataset.name, dataset.location, reads) == ("d", str(file), [])
    digest = dataset.sha256
    assert [row.response for row in dataset.rows()] == ["b", "b"]
    assert dataset.prompts() == ["a?", "a?"]
    assert dataset.prompts(of_rows=True)[0] is dataset.rows()[0].prompt
    assert (dataset.bad_rows, dataset.has_labels) == ([], True)
    assert dataset.formats == {"prompt/response": 2}
    assert reads == [file.name]
    assert digest == sha256(file)


def test_what_was_released_is_read_again(tmp_path, reads):
    (tmp_path / "d.jsonl").write_text(json.dumps(LABELLED), encoding="utf-8")
    dataset = Dataset(tmp_path / "d.jsonl")
    before = dataset.sha256
    dataset.rows()
    dataset.release()
    (tmp_path / "d.jsonl").write_text(f"{json.dumps(LABELLED)}\n" * 2, encoding="utf-8")
    assert len(dataset.rows()) == 2
    assert dataset.sha256 == sha256(tmp_path / "d.jsonl") != before
    assert len(reads) == 2


def test_a_row_without_an_answer_is_still_a_prompt(tmp_path):
    lines = [LABELLED, {"prompt": "c?"}, "d?", PREPARED, {"x": 1}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    dataset = Dataset(tmp_path / "d.jsonl")
    assert dataset.prompts(skip_bad_rows=True) == ["a?", "c?", "d?", "p", "q"]
    assert [row.line for row in dataset.rows(skip_bad_rows=True)] == [1]
    assert [bad.line for bad in dataset.bad_rows] == [2, 3, 4, 5]
    with pytest.raises(DataError, match=r"d\.jsonl:5: "):
        dataset.prompts()


def test_a_text_file_is_a_prompt_a_line_or_holds_rows(tmp_path, reads):
    (tmp_path / "d.txt").write_text(f"{json.dumps(LABELLED)}\n", encoding="utf-8")
    dataset = Dataset(tmp_path / "d.txt")
    assert dataset.prompts(of_rows=True) == ["a?"]
    assert dataset.prompts() == [json.dumps(LABELLED)]
    assert len(dataset.rows()) == 1
    assert reads == ["d.txt"]


def test_skipped_rows_are_warned_of_once(tmp_path, caplog):
    (tmp_path / "d.jsonl").write_text(f"{json.dumps(LABELLED)}\nx", encoding="utf-8")
    dataset = Dataset(tmp_path / "d.jsonl")
    assert dataset.check(skip_bad_rows=True) == 1
    assert not caplog.records
    for _ in range(2):
        dataset.rows(skip_bad_rows=True)
    assert len(caplog.records) == 1


def test_a_dataset_that_is_not_there_has_no_labels(tmp_path):
    dataset = Dataset(tmp_path / "none.jsonl")
    assert not dataset.has_labels
    with pytest.raises(UsageError, match="none"):
        dataset.sha256  # noqa: B018  # a property that reads


def test_hub_rows_are_read_once_and_hashed(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "loragen.core.data.documents.read_hub", lambda *args: calls.append(args) or [LABELLED]
    )
    dataset = Dataset.at("hub:owner/name")
    assert dataset.name == "name"
    assert dataset.location == "hub:owner/name@train"
    assert len(dataset.sha256) == 64
    assert dataset.prompts() == ["a?"]
    assert len(calls) == 1


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
    first, second = Dataset(file(f"{GOOD}\n\n  \n" + '{"prompt":"ä","response":"ö","x":1}')).rows()
    assert (first.prompt, first.response, first.system, first.line) == ("p", "r", None, 1)
    assert (second.prompt, second.response, second.line) == ("ä", "ö", 4)


def test_numbers_as_answers_are_said_once(file, caplog):
    path = file('{"input": "p", "output": "r"}\n{"input": "p", "output": [7, "seven"]}')
    dataset = Dataset(path)
    for _ in range(2):
        assert [(row.response, row.also_right) for row in dataset.rows()] == [
            ("r", ()),
            ("7", ("seven",)),
        ]
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{path}:2: 1 of 2 rows have a number or a boolean as their answer, which is taken as its "
        "JSON text (7)"
    )


def test_system_and_choices_are_kept(file):
    document = {"prompt": "p", "response": "a", "system": "s", "choices": ["a", "b"]}
    (row,) = Dataset(file(json.dumps(document))).rows()
    assert (row.system, row.choices) == ("s", ["a", "b"])


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.txt"])
def test_a_byte_order_mark_is_no_text(file, name):
    text = f"[{GOOD}]" if name == "d.json" else GOOD
    (row,) = Dataset(file(b"\xef\xbb\xbf" + text.encode(), name)).rows()
    assert row.prompt == "p"


def test_windows_line_ends_are_line_ends(file):
    rows = Dataset(file(f"{GOOD}\r\n{GOOD}\r\n")).rows()
    assert [(row.response, row.line) for row in rows] == [("r", 1), ("r", 2)]


def test_a_line_separator_inside_a_text_is_no_line_end(file):
    (row,) = Dataset(file('{"prompt": "a\u2028b\x85c", "response": "r"}')).rows()
    assert row.prompt == "a\u2028b\x85c"


def test_a_json_list_counts_its_items(file):
    rows = Dataset(file(f"[{GOOD},\n\n{GOOD}]", "d.json")).rows()
    assert [row.line for row in rows] == [1, 2]


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"prompt": "p"', "not JSON.*column"),
        ("p -> r", "not JSON.*column 1"),
        ("[1, 2]", "object.*list"),
        ('"text"', "object.*text"),
        ("null", "object.*null"),
        ('{"question": "p", "response": "r"}', "'answer'.*question, resp"),
        ('{"prompt": "p"}', "'response'.*prompt"),
        ('{"text": "p", "label": 1}', "text, label.*prompt/response, instruc"),
        ("{}", "none.*prompt/response"),
        ('{"prompt": 3, "response": "r"}', "'prompt'.*int 3"),
        ('{"prompt": "p", "response": null}', "'response'.*null"),
        ('{"prompt": "p", "response": [["r"]]}', "'response'.*list"),
        (r'{"prompt": "p", "response": "\ud83d"}', "'response'.*surrogate"),
        ('{"prompt": "p", "response": " "}', "'response'.*empty"),
        ('{"prompt": "p", "response": "r", "system": 1}', "'system'.*int 1"),
        (
            '{"prompt": "p", "response": "r", "choices": "ab"}',
            "'choices'.*list.*text",
        ),
    ],
)
def test_a_malformed_row_is_one_line_with_its_place(file, line, reason):
    path = file(f"{GOOD}\n\n{line}\n{GOOD}")
    with pytest.raises(DataError, match=reason) as error:
        Dataset(path).rows()
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
        Dataset(path).rows()
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_a_missing_file_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        Dataset(tmp_path / "none.jsonl").rows()


def found(wanted, root, split="train"):
    dataset = Dataset.find(wanted, root, split)
    return dataset.name, dataset.file or dataset.source


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
    assert found("boolq", root) == ("boolq", root / "boolq/boolq_train_formatted.jsonl")
    name, file = found("boolq", root, split="test")
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
    assert found(str(file), tmp_path / "nowhere") == (name, file)


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
        found(wanted, root)


def test_a_root_that_is_not_there_is_said_so(tmp_path):
    with pytest.raises(UsageError, match="--data-root"):
        found("boolq", tmp_path / "none")


def test_the_real_tasks_are_read(shared):
    root = shared / "tasks"
    names = dataset_names(root)
    assert len(names) == 52
    for name in names:
        for split in ("train", "test"):
            assert Dataset.find(name, root, split).formats.keys() == {"prompt/response"}


def test_the_real_data_is_read(shared):
    root = shared / "data_to_lora" / "cs"
    assert "arc-challenge" in dataset_names(root)
    for name in dataset_names(root):
        rows = Dataset.find(name, root, "test").rows()
        assert rows
        assert all(row.prompt and row.response.startswith("[") for row in rows)


BAD = '{"prompt": "p"}'


def reported(file, **options):
    with pytest.raises(DataError) as error:
        Dataset(file).rows(**options)
    return error.value.problems


def test_every_bad_row_is_reported(file):
    path = file("\n".join([GOOD, BAD, "x", GOOD, BAD]))
    problems = reported(path)
    assert [problem.split(": ")[0] for problem in problems] == [f"{path}:{n}" for n in (2, 3, 5)]
    assert problems[-1].endswith("leaves them out)")
    assert not any("--skip" in problem for problem in problems[:-1])


def test_many_bad_rows_are_counted(file):
    path = file("\n".join([GOOD, *[BAD, "x"] * 6]))
    problems = reported(path)
    assert len(problems) == 6
    assert problems[-1].startswith(f"{path}: and 7 more")
    assert "--skip-bad-rows" in problems[-1]


def test_bad_rows_are_left_out_with_one_warning(file, caplog):
    path = file("\n".join([BAD, GOOD, *["x"] * 6, GOOD]))
    assert [row.line for row in Dataset(path).rows(skip_bad_rows=True)] == [2, 9]
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith(f"{path}: 7 of 9 rows left out: line 1: 'response' is missing")
    assert message.endswith("; line 6: not JSON: Expecting value at column 1; and 2 more")


@pytest.mark.parametrize("skip", [False, True])
def test_no_good_row_is_an_error_either_way(file, skip):
    assert reported(file(f"{BAD}\nx"), skip_bad_rows=skip)[-1].endswith("(no row is good)")
    (problem,) = reported(file("\n".join(['{"a": 1}'] * 9)), skip_bad_rows=skip)
    assert problem.endswith("(the same in all of its 9 rows)")


@pytest.mark.parametrize(
    "path",
    ["x/train.csv", "x/train.jsonl", "x_train.json", "x.parquet", "x.jsonl"],
)
def test_a_dataset_by_name_may_be_any_kind_of_file(root, path):
    file = root / path
    file.parent.mkdir(exist_ok=True)
    file.touch()
    assert found("x", root) == ("x", file)
    assert dataset_names(root) == ["arc-easy", "boolq", "x"]


def test_the_formatted_file_goes_before_others(root):
    (root / "boolq" / "train.csv").touch()
    assert found("boolq", root)[1].name == "boolq_train_formatted.jsonl"


@pytest.mark.parametrize(
    "text, holds",
    [
        ('{"colors": {"family": "words"},\n "boolq": {}}', False),
        ('\ufeff{"families": ["words"]}', False),
        ('{"Definition": ["Say it."], "Instances" : [{"input": "a", "output": ["b"]}]}', True),
        ('{"prompt": "a", "response": "b"}\n{"prompt": "c", "response": "d"}\n', True),
        ('[{"prompt": "a", "response": "b"}]', True),
        ("[{", True),
    ],
)
def test_a_json_file_about_the_datasets_is_none_of_them(root, text, holds):
    (root / "about.json").write_text(text, encoding="utf-8")
    assert ("about" in dataset_names(root)) == holds


def test_two_files_of_a_name_are_ambiguous(root):
    for name in ("x.csv", "x_train.jsonl"):
        (root / name).touch()
    with pytest.raises(UsageError, match=r"ambiguous.*x_train\.jsonl.*x\.csv"):
        found("x", root)
    assert dataset_names(root) == ["arc-easy", "boolq", "x"]


def test_a_file_without_a_split_is_for_training_alone(root):
    (root / "x.csv").touch()
    with pytest.raises(UsageError, match=r"'x'.*test split.*x\.csv"):
        found("x", root, split="test")
    assert dataset_names(root, "test") == ["arc-easy", "boolq"]


def test_a_folder_is_a_dataset_too(root, tmp_path):
    assert found(str(root / "boolq"), tmp_path / "none") == found("boolq", root)
    with pytest.raises(UsageError, match="unknown dataset 'empty'"):
        found(str(root / "empty"), tmp_path / "none")


def test_a_folder_elsewhere_is_never_a_namesake_here(root, tmp_path, monkeypatch):
    """Not of the working directory, and not of the root."""
    here = tmp_path / "here"
    for folder, split in ((here / "boolq", "train"), (tmp_path / "other/boolq", "test")):
        folder.mkdir(parents=True)
        (folder / f"{split}.jsonl").write_text(GOOD, encoding="utf-8")
    monkeypatch.chdir(here)
    for wanted in (str(tmp_path / "other/boolq"), "../other/boolq"):
        with pytest.raises(UsageError, match=r"'boolq'.*train split.*test\.jsonl"):
            found(wanted, root)
        assert found(wanted, root, "test")[0] == "boolq"


@pytest.mark.parametrize("wanted", ["boolq/", "cs/boolq", "cs/boolq/", "cs/x", "./cs/boolq"])
def test_a_name_has_no_slash_in_it(root, tmp_path, wanted):
    """A run directory is named after it."""
    (root / "x.csv").touch()
    place = root if wanted == "boolq/" else root.parent
    name, file = found(wanted, place)
    assert name == wanted.strip("/").rpartition("/")[2]
    assert file == found(name, root)[1]


def test_a_folder_may_be_the_working_directory(root, monkeypatch):
    monkeypatch.chdir(root / "boolq")
    for elsewhere in (root / "none", root, root / "boolq"):
        assert found(".", elsewhere) == found("boolq", root)


@pytest.mark.parametrize("nothing", ["", " "])
def test_nothing_is_no_dataset(root, nothing):
    with pytest.raises(UsageError, match=r"^no dataset: its name is empty"):
        found(nothing, root)


def test_owner_and_name_are_a_hub_dataset_where_they_are_nothing_else(root):
    name, source = found("owner/name", root, split="test")
    assert (name, str(source)) == ("name", "hub:owner/name@test")
    with pytest.raises(UsageError, match="no such file"):
        found("owner/name.csv", root)


def test_a_folder_without_a_dataset_tells_what_it_holds(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.jsonl").write_text("{}", encoding="utf-8")
    with pytest.raises(UsageError, match=r"mine_train.*a\.jsonl"):
        found("mine", tmp_path)


@pytest.fixture
def shards(tmp_path):
    """Three files of three rows each, whose natural order is not the alphabetical one."""
    folder = tmp_path / "rows" / "colors"
    folder.mkdir(parents=True)
    for number in (1, 2, 10):
        lines = [{"prompt": f"{number}.{n}", "response": "r"} for n in (1, 2, 3)]
        (folder / f"part-{number}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.mark.parametrize("named", ["colors", "{}", "{}/*.jsonl", "{}/part-*.jsonl"])
def test_several_files_are_one_dataset(shards, named):
    dataset = Dataset.find(named.format(shards), shards.parent)
    assert dataset.name == "colors"
    rows = dataset.rows()
    assert [row.prompt for row in rows] == [f"{file}.{n}" for file in (1, 2, 10) for n in (1, 2, 3)]
    assert [row.line for row in rows] == list(range(1, 10))
    again = Dataset.at(dataset.location)
    assert (again.sha256, again.rows()) == (dataset.sha256, rows)
    assert dataset_names(shards.parent) == ["colors"]


def test_a_bad_row_of_several_files_has_its_own_place(shards):
    before = Dataset.find(str(shards), shards).sha256
    with (shards / "part-2.jsonl").open("a") as file:
        file.write('\n\n{"prompt": 3}')
    dataset = Dataset.find(str(shards), shards)
    with pytest.raises(DataError, match=r"part-2\.jsonl:5: 'response' is missing"):
        dataset.rows()
    assert [row.line for row in dataset.rows(skip_bad_rows=True)] == [1, 2, 3, 4, 5, 6, 9, 10, 11]
    assert dataset.sha256 != before


def test_shards_of_the_hub_are_found_by_split(tmp_path):
    folder = tmp_path / "colors" / "data"
    folder.mkdir(parents=True)
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"prompt": name, "response": "r"}))
    assert len(Dataset.find("colors", tmp_path).rows()) == 2
    assert [row.prompt[:4] for row in Dataset.find("colors", tmp_path, "test").rows()] == ["test"]
    with pytest.raises(UsageError, match=r"by a pattern in quotation marks"):
        Dataset.find(str(folder), tmp_path / "none", "val")


def test_files_of_several_names_are_no_shards(shards):
    (shards / "animals.jsonl").write_text(GOOD)
    with pytest.raises(UsageError, match=r"'colors'.*as one dataset by a pattern"):
        Dataset.find("colors", shards.parent)
    assert len(Dataset.find(f"{shards}/*.jsonl", shards).rows()) == 10
    (shards / "x.csv").write_text("prompt,response\na,b\n")
    with pytest.raises(UsageError, match=r"expected files of one kind .*found \.csv, \.jsonl"):
        Dataset.find(f"{shards}/*", shards).rows()
    with pytest.raises(UsageError, match="no such files"):
        Dataset.find(f"{shards}/*.none", shards).rows()


def row(prompt, response, **more):
    return Row(prompt=prompt, response=response, line=1, **more)


@pytest.mark.parametrize(
    "responses, closed",
    [
        (["a", "b", "a", "b"], ["a", "b"]),
        (["b", "a"] * 10, ["a", "b"]),
        (["a"] * 8, None),  # one answer is no choice
        (["a", "b", "c"], None),  # they do not recur
        ([f"{i % 16}" for i in range(32)], sorted(f"{i}" for i in range(16))),
        ([f"{i % 17}" for i in range(100)], None),  # too many
        ([f"free text {i}" for i in range(10)], None),
    ],
)
def test_a_closed_answer_set_is_small_and_recurs(responses, closed):
    assert closed_answers([row("p", response) for response in responses]) == closed


def test_a_rows_own_choices_come_before_the_closed_set():
    rows = [row("p", "a", choices=["a", "z"]), row("q", "b")]
    assert allowed_answers(rows, ["a", "b"]) == [["a", "z"], ["a", "b"]]
    assert allowed_answers(rows, None) is None
    several = [row("p", "a", also_right=("c", "b"))]
    assert allowed_answers(several, ["a", "b"]) == [["a", "b", "c"]]
