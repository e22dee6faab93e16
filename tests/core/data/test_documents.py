import csv
import gc
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loragen.core.data.dataset import Dataset, Row, dataset_names
from loragen.core.data.documents import (
    DataFile,
    HubDataset,
    parsed_source,
)
from loragen.core.data.formats import Turn
from loragen.core.errors import DataError, UsageError
from loragen.core.hub import TIMEOUT, hub_problem

from .writers import FILES, FORMATS, NO_CHOICES

characters = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
text = st.text(characters, max_size=12)
some = st.text(characters, min_size=1, max_size=12)
answers = some.filter(str.strip)
rows = st.builds(
    dict,
    prompt=st.one_of(text, st.builds("{}\n\n{}".format, text, text)),
    response=answers,
    system=st.none() | some,
    history=st.lists(st.builds(Turn, text, text), max_size=2).map(tuple),
    choices=st.none() | st.lists(text, min_size=1, max_size=3),
)


def reread(file, fields, form, suffix):
    wanted = [Row(**row, line=line) for line, row in enumerate(fields, start=1)]
    if form in NO_CHOICES:
        wanted = [replace(row, choices=None) for row in wanted]
    FILES[suffix](file, [FORMATS[form](row) for row in wanted])
    read = Dataset(file).rows()
    if suffix == ".csv":  # whose lines are those of the file; see below
        read = [replace(row, line=n) for n, row in enumerate(read, start=1)]
    return read, wanted


@pytest.mark.parametrize("suffix", FILES)
@pytest.mark.parametrize("form", FORMATS)
def test_any_row_in_any_format_and_file_is_read_back(tmp_path_factory, form, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    file = tmp_path_factory.mktemp("rows") / f"d{suffix}"

    @settings(max_examples=40)  # for each format in each kind of file
    @given(st.lists(rows, min_size=1, max_size=3))
    def check(fields):
        read, wanted = reread(file, fields, form, suffix)
        assert read == wanted

    check()


@pytest.mark.parametrize("suffix", FILES)
def test_choices_are_read_back_from_every_file(tmp_path, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    choices = {"text": ["red", 'blue\n"green"'], "label": ["A", "B"]}
    document = {"question": "Which?", "choices": choices, "answerKey": "B", "system": None}
    FILES[suffix](tmp_path / f"d{suffix}", [document, document])
    first, second = Dataset(tmp_path / f"d{suffix}").rows()
    assert first.prompt == second.prompt == 'Which?\nA: red\nB: blue\n"green"'
    assert first.response == "[B]"
    assert first.choices == ["[A]", "[B]"]


def test_an_index_means_the_same_in_every_file(tmp_path):
    """Or is refused: a cell of a CSV file is a text, and texts and numbers count differently."""
    row = {"question": "Which?", "choices": ["red", "green", "blue"], "answer": 1}
    for suffix in (".jsonl", ".json"):
        FILES[suffix](tmp_path / f"d{suffix}", [row])
        assert Dataset(tmp_path / f"d{suffix}").rows()[0].response == "[B]"
    FILES[".csv"](tmp_path / "d.csv", [row])
    with pytest.raises(DataError, match=r"d\.csv:2: 'answer': '1'"):
        Dataset(tmp_path / "d.csv").rows()


def lines(file, content):
    file.write_bytes(content.encode())
    return [(document.line, document.value) for document in DataFile(file).documents()]


def test_the_line_of_a_csv_record_is_where_it_starts(tmp_path):
    content = '\ufeffprompt,response\r\n"a\r\nb",1\r\n\r\n\n"c\n\nd",2\ne,3\n'
    assert lines(tmp_path / "d.csv", content) == [
        (2, {"prompt": "a\r\nb", "response": "1"}),
        (6, {"prompt": "c\n\nd", "response": "2"}),
        (9, {"prompt": "e", "response": "3"}),
    ]


def test_a_long_csv_cell_is_read(tmp_path):
    limit = csv.field_size_limit()
    assert lines(tmp_path / "d.csv", f"prompt\n{'x' * 200_000}\n")[0][1]["prompt"] == "x" * 200_000
    assert csv.field_size_limit() == limit


def test_a_csv_row_of_other_length_is_a_bad_row(tmp_path):
    (tmp_path / "d.csv").write_text("prompt,response\na,b\nc\nd,e,f\n", encoding="utf-8")
    problems = [document.problem for document in DataFile(tmp_path / "d.csv").documents()]
    assert problems == [None, "1 cells, the header has 2", "3 cells, the header has 2"]


def test_a_table_separated_by_tabs_is_read(tmp_path):
    content = 'prompt\tresponse\n"a\t""b"""\tc, d; e\n\nf\tg\n'
    assert lines(tmp_path / "d.tsv", content) == [
        (2, {"prompt": 'a\t"b"', "response": "c, d; e"}),
        (4, {"prompt": "f", "response": "g"}),
    ]


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("d.csv", "prompt;response\na;b\n", "not comma-separated; it has columns .* semicolons"),
        ("d.csv", "prompt\tresponse\na\tb\n", "not comma-separated; .* tabs, whose .* in .tsv"),
        ("d.tsv", "prompt,response\na,b\n", "not tab-separated; .* commas, whose name .* in .csv"),
    ],
)
def test_another_separator_is_said(tmp_path, name, content, reason):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=f"{name}:1: {reason}"):
        list(DataFile(tmp_path / name).documents())


def test_a_quotation_mark_within_a_cell_is_said(tmp_path):
    with pytest.raises(DataError, match=r"d\.tsv:2: not TSV: .* has to end with one"):
        lines(tmp_path / "d.tsv", 'prompt\tresponse\n"a" b\tc\n')


@pytest.mark.parametrize("encoding, name", [("utf-16", "UTF-16"), ("gb18030", "GB18030")])
@pytest.mark.parametrize("file", ["d.tsv", "d.csv", "d.jsonl", "d.json"])
def test_other_encodings_are_said_by_name(tmp_path, encoding, name, file):
    text = '{"prompt": "你好，今天天气怎么样？", "response": "很好，谢谢。"}\n'
    text = "prompt,response\n" + text[1:] if file in ("d.tsv", "d.csv") else text
    (tmp_path / file).write_bytes(text.encode(encoding))
    with pytest.raises(DataError, match=f"{name} text; save it as UTF-8"):
        list(DataFile(tmp_path / file).documents())


@pytest.mark.parametrize(
    "document, rows",
    [
        ({"data": [{"a": 1}], "version": 2}, [{"a": 1}]),
        (
            {
                "Definition": ["Say it.", "Shortly."],
                "Positive Examples": [{"input": "x", "output": "y"}],
                "Instances": [{"input": "i", "output": ["o"]}],
                "Instance License": ["MIT"],
            },
            [{"Definition": "Say it.\nShortly.", "input": "i", "output": ["o"]}],
        ),
        (
            {"name": "n", "task_prefix": "t", "system": "s", "examples": [{"system": "own"}, "x"]},
            [{"system": "own", "task_prefix": "t"}, "x"],
        ),
    ],
)
def test_rows_may_be_wrapped_in_an_object(tmp_path, document, rows):
    found = lines(tmp_path / "d.json", json.dumps(document))
    assert found == list(enumerate(rows, start=1))


@pytest.mark.parametrize(
    "document, reason",
    [
        ({"examples": [], "data": []}, "found dict with rows in 'examples' and 'data'"),
        ({"mine": [1]}, "found dict; the rows may be in its 'mine'"),
        ({"data": {"train": []}}, "expected a list of rows, found dict$"),
    ],
)
def test_an_object_whose_rows_are_not_clear_is_refused(tmp_path, document, reason):
    with pytest.raises(DataError, match=rf"d\.json:1: .*{reason}"):
        lines(tmp_path / "d.json", json.dumps(document))


def test_json_lines_under_the_name_of_json_are_read(tmp_path):
    assert lines(tmp_path / "d.json", '{"a": 1}\n\n{"a": 2}\n') == [(1, {"a": 1}), (3, {"a": 2})]


BIG = '{"prompt": "p", "response": "r", "n": ' + "1" * 5000 + "}"
DEEP = '{"prompt": "p", "response": "r", "n": ' + "[" * 100_000 + "]" * 100_000 + "}"
READ = '{"prompt": "p", "response": "r"}'


@pytest.mark.parametrize(
    "content, reason",
    [(BIG, "a number in it is too long"), (DEEP, "nested too deeply")],
    ids=["big", "deep"],
)
def test_json_that_python_cannot_hold_is_a_bad_row(tmp_path, content, reason):
    file = tmp_path / "d.jsonl"
    file.write_text(f"{READ}\n{content}\n", encoding="utf-8")
    with pytest.raises(DataError) as error:
        Dataset(file).rows()
    assert str(error.value).startswith(f"{file}:2: {reason}")
    assert "--skip-bad-rows" in str(error.value)
    assert len(Dataset(file).rows(skip_bad_rows=True)) == 1
    file = tmp_path / "d.json"
    file.write_text(f"[{READ}, {content}]", encoding="utf-8")
    with pytest.raises(DataError) as error:
        Dataset(file).rows()
    assert str(error.value) == f"{file}: {reason}"


def test_a_cell_that_python_cannot_hold_stays_a_text(tmp_path):
    cell = "[" * 100_000
    (tmp_path / "d.csv").write_text(f"prompt,choices\np,{cell}\n", encoding="utf-8")
    assert next(DataFile(tmp_path / "d.csv").documents()).value["choices"] == cell


def test_a_key_that_is_given_twice_costs_its_row_and_little_time(tmp_path):
    """In a file of 20 MB; and in an object of 100,000 keys."""
    row = json.dumps({"prompt": "p" * 1000, "response": "r"})
    wide = "{" + "".join(f'"{key}": 1, ' for key in range(100_000)) + '"7": 2}'
    twice = '{"prompt": "p", "prompt": "q"}'
    (tmp_path / "d.json").write_text(f"[{wide}, {f'{row}, ' * 20_000}{twice}]")
    first, *good, last = DataFile(tmp_path / "d.json").documents()
    assert (first.line, first.problem) == (1, "the key '7' is given twice")
    assert (len(good), good[-1].value) == (20_000, json.loads(row))
    assert (last.line, last.problem) == (20_002, "the key 'prompt' is given twice")


def test_suffixes_may_be_in_capitals(tmp_path):
    assert lines(tmp_path / "D.CSV", "a\n1\n") == [(2, {"a": "1"})]


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("d.csv", 'prompt,response\na,b\n"c\nd', ":3: not CSV: unexpected end of data"),
        ("d.csv", "a,b,a\n1,2,3\n", ":1: the header names 'a' twice"),
        ("wide.csv", ",".join([*map(str, range(100_000)), "7"]), ":1: the header names '7' twice"),
        ("d.csv", b"\xff\xfe", "not UTF-8 text"),
        ("d.json", "[1", ":1: not JSON"),
        ("d.parquet", "PAR1 no", "it is truncated"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, name, content, reason):
    if name == "d.parquet":
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=reason) as error:
        list(DataFile(tmp_path / name).documents())
    assert str(error.value).startswith(str(tmp_path / name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("missing, source", [("pyarrow", "d.parquet"), ("datasets", "hub:a/b")])
def test_a_missing_package_is_one_line_that_says_what_to_install(
    tmp_path, monkeypatch, missing, source
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.parquet").touch()
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UsageError, match=r"pip install 'datasets\S* 'pyarrow"):
        list(parsed_source(source).documents())


@pytest.mark.parametrize(
    "text, split, parts, name",
    [
        ("hub:openai/gsm8k", "train", ("openai/gsm8k", None, "train"), "gsm8k"),
        ("hub:openai/gsm8k", "test", ("openai/gsm8k", None, "test"), "gsm8k"),
        ("hub:a/b.c:main@test", "train", ("a/b.c", "main", "test"), "b.c-main"),
        ("hub:a/b@train[:9]", "test", ("a/b", None, "train[:9]"), "b"),
    ],
)
def test_a_hub_dataset_has_an_id_a_config_and_a_split(text, split, parts, name):
    source = parsed_source(text, split)
    assert source == HubDataset(*parts)
    assert source.name == name
    assert parsed_source(source.location) == source


@pytest.mark.parametrize(
    "text", ["hub:", "hub:a", "hub:a/b/c", "hub:a/b:", "hub:a/b:x/y", "hub:a/b@"]
)
def test_a_malformed_hub_id_is_refused(text):
    with pytest.raises(UsageError, match="expected hub:owner/name"):
        parsed_source(text)


def test_a_file_is_found_again_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parsed_source("d.csv").location == str(tmp_path / "d.csv")


def test_a_file_may_be_in_the_home_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert parsed_source("~/d.csv").location == str(tmp_path / "d.csv")
    (tmp_path / "1.csv").touch()
    assert parsed_source("~/*.csv").files == [tmp_path / "1.csv"]
    assert parsed_source("~none\0/d.csv").path == Path("~none\0/d.csv")


@pytest.fixture
def hub_dataset(tmp_path, monkeypatch):
    """A folder that `datasets` takes for the hub dataset `owner/colors`."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "owner" / "colors"
    folder.mkdir(parents=True)
    for split, word in (("train", "red"), ("test", "blue")):
        document = {"question": f"{split}?", "answer": word}
        (folder / f"{split}.jsonl").write_text(json.dumps(document) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)


def test_a_hub_dataset_is_read_by_split(hub_dataset, tmp_path):
    dataset = Dataset.find("hub:owner/colors", tmp_path / "none")
    assert dataset.name == "colors"
    assert list(dataset.rows()) == [Row(prompt="train?", response="red", line=1)]
    test = Dataset.find("hub:owner/colors", tmp_path / "none", split="test")
    assert [row.response for row in test.rows()] == ["blue"]
    assert dataset.sha256 == Dataset(dataset.source).sha256 != test.sha256


def test_of_a_slice_only_its_rows_are_fetched(hub_dataset, tmp_path, monkeypatch):
    import datasets

    rows = [{"question": f"{n}?", "answer": "a"} for n in range(5)]
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    (tmp_path / "owner/colors/train.jsonl").write_text(text, encoding="utf-8")
    asked = []
    load = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **more: asked.append(more) or load(*args, **more)
    )
    for split, wanted in (("train[:2]", "01"), ("train[1:3]", "12"), ("train[3:99]", "34")):
        found = Dataset(parsed_source(f"hub:owner/colors@{split}")).rows()
        assert [row.prompt[0] for row in found] == list(wanted)
    assert all(more == {"split": "train", "streaming": True} for more in asked)


def test_a_saved_dataset_is_read_by_split(tmp_path):
    datasets = pytest.importorskip("datasets")
    parts = {
        split: datasets.Dataset.from_list([{"input": split, "output": ["a", "b"]}])
        for split in ("train", "test")
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "colors")
    for name in ("colors", str(tmp_path / "colors")):
        for split in parts:
            dataset = Dataset.find(name, tmp_path, split)
            row = Row(prompt=split, response="a", also_right=("b",), line=1)
            assert (dataset.name, *dataset.rows()) == ("colors", row)
            again = Dataset.at(dataset.location)
            assert (again.sha256, *again.rows()) == (dataset.sha256, row)
    with pytest.raises(UsageError, match="no split 'val' was saved in it; there is test, train"):
        Dataset.find(str(tmp_path / "colors"), tmp_path, "val")
    parts["train"].save_to_disk(tmp_path / "single")
    assert len(Dataset.find("single", tmp_path).rows()) == 1
    assert dataset_names(tmp_path) == ["colors", "single"]
    (tmp_path / "single" / "data-00000-of-00001.arrow").write_bytes(b"x")
    with pytest.raises(DataError, match="single: not a saved dataset that can be read"):
        Dataset.find("single", tmp_path).rows()


def test_the_rows_of_a_table_are_made_when_they_are_used(tmp_path):
    datasets = pytest.importorskip("datasets")
    documents = [{"input": f"{n}?", "output": "even" if n % 2 == 0 else "odd"} for n in range(40)]
    documents[7]["output"] = ""
    datasets.Dataset.from_list(documents).save_to_disk(tmp_path / "saved")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, documents)), encoding="utf-8")
    saved, file = Dataset.find("saved", tmp_path), Dataset(tmp_path / "rows.jsonl")
    before = _rows_in_memory()
    rows = saved.rows(skip_bad_rows=True)
    assert (len(rows), _rows_in_memory()) == (39, before)
    expected = file.rows(skip_bad_rows=True)
    assert list(rows) == [rows[index] for index in range(39)] == rows[:] == expected
    assert (rows[-1].line, [row.line for row in rows[6:8]]) == (40, [7, 9])
    assert (saved.bad_rows, saved.formats) == (file.bad_rows, file.formats)
    assert saved.closed_answers == ["even", "odd"]
    assert saved.prompts() == file.prompts() == [document["input"] for document in documents]


def _rows_in_memory():
    return sum(isinstance(one, Row) for one in gc.get_objects())


def test_a_split_that_is_not_there_names_those_that_are(hub_dataset):
    with pytest.raises(UsageError, match=r"hub dataset owner/colors: .*none.*train.*test") as error:
        Dataset(parsed_source("hub:owner/colors@none")).rows()
    assert "\n" not in str(error.value)


def test_offline_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"hub dataset no-one/none: .*[Oo]ffline") as error:
        Dataset(parsed_source("hub:no-one/none")).rows()
    assert "\n" not in str(error.value)


def test_a_hub_that_does_not_answer_is_told_fast(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    hub_problem.cache_clear()
    started = time.perf_counter()
    with pytest.raises(UsageError, match="HF_ENDPOINT") as error:
        Dataset(parsed_source("hub:no-one/none")).rows()
    assert time.perf_counter() - started < TIMEOUT
    hub_problem.cache_clear()
    assert "\n" not in str(error.value)


def test_reading_a_file_imports_nothing_big(tmp_path):
    (tmp_path / "d.csv").write_text("prompt,response\na,b\n", encoding="utf-8")
    code = (
        "import sys, pathlib\nfrom loragen.core.data.dataset import Dataset\n"
        f"Dataset(pathlib.Path({str(tmp_path / 'd.csv')!r})).rows()\n"
        "print([n for n in ('torch', 'datasets', 'pyarrow', 'numpy') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
