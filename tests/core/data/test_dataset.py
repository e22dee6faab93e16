import json
from pathlib import Path

import pytest

from loragen.core.data.dataset import Dataset
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
    dataset.rows()
    dataset.release()
    assert len(dataset.rows()) == 1
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
