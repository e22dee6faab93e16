"""Files that are not what they seem: the error names the file and what it is instead."""

import gzip
import io
import json
import os
import zipfile

import pytest

from loragen.core.config import GenTrainConfig, LoraTrainConfig, load
from loragen.core.data.dataset import Dataset
from loragen.core.errors import ConfigError, DataError, LoragenError, UsageError
from loragen.core.files import nature, read_json
from loragen.core.lora.tasks import find_tasks

ROWS = [{"prompt": f"What colour has {i}?", "response": ["red", "green"][i % 2]} for i in range(4)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = "prompt,response\n" + "".join(f"{row['prompt']},{row['response']}\n" for row in ROWS)
CHINESE = '{"prompt": "天空是什么颜色的？请回答。", "response": "蓝色"}\n' * 3
JAPANESE = '{"prompt": "そらはなにいろですか、とたずねた", "response": "あお"}\n' * 3
KOREAN = '{"prompt": "하늘은 무슨 색입니까", "response": "파란색"}\n' * 3


def workbook():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("xl/workbook.xml", "<workbook/>")
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", LINES.encode("utf-16"), "it is UTF-16 text; save it as UTF-8"),
        ("a.jsonl", LINES.encode("utf-16-le"), "it is UTF-16LE text"),
        ("a.csv", CSV.encode("utf-16-be"), "it is UTF-16BE text"),
        ("a.json", json.dumps(ROWS).encode("utf-32"), "it is UTF-32 text"),
        ("a.txt", "hello\nworld\n".encode("utf-16"), "it is UTF-16 text"),
        ("a.jsonl", CHINESE.encode("gb18030"), "it is GB18030 text"),
        ("a.txt", "你好，世界\n".encode("gbk"), "it is GB18030 text"),
        ("a.csv", "prompt,response\n天空是什麼顏色的呢,藍色\n".encode("big5"), "it is Big5 text"),
        ("a.jsonl", JAPANESE.encode("shift_jis"), "it is Shift-JIS text"),
        ("a.jsonl", KOREAN.encode("euc_kr"), "it is EUC-KR text"),
        ("a.jsonl", '{"prompt": "café", "response": "x"}\n'.encode("latin-1"), "Windows-1252"),
        ("a.csv", CSV.replace(",", ";").encode(), ":1: not comma-separated; it has columns sep"),
        ("a.csv", CSV.replace(",", "\t").encode(), "separated by tabs (TSV)"),
        ("a.tsv", CSV.replace(",", "\t").encode(), "separated by tabs (TSV)"),
        ("a.csv", CSV.replace(",", "|").encode(), "separated by '|'"),
        ("a.csv", CSV.replace(",", ", ").encode(), "the header has ' response'"),
        ("a.csv", LINES.encode(), "not CSV; it is JSON"),
        ("a.csv", workbook(), "an Excel workbook"),
        ("a.jsonl", json.dumps(ROWS).encode(), "a JSON array, whose name ends in .json"),
        ("a.jsonl", json.dumps(ROWS, indent=1).encode(), "a JSON array, whose name ends in .json"),
        ("a.jsonl", json.dumps(ROWS[0], indent=1).encode(), "JSON over several lines"),
        ("a.jsonl", LINES.replace("\n", "").encode(), "several rows on one line"),
        ("a.jsonl", LINES.replace("\n", "\r").encode(), "end with a carriage return"),
        ("a.jsonl", CSV.encode(), "CSV, whose name ends in .csv"),
        ("a.jsonl", b"{'prompt': 'a', 'response': 'b'}\n", "that Python has printed"),
        ("a.jsonl", gzip.compress(LINES.encode()), "compressed (gzip)"),
        ("a.jsonl", b"<!DOCTYPE html><html>log in</html>", "a web page"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS"),
        ("a.jsonl", b"PAR1" + bytes(9) + b"PAR1", "a Parquet file"),
        ("a.jsonl", bytes(100), "nothing but NUL bytes"),
        ("a.jsonl", LINES.encode() + bytes(100), ":5: not JSON: NUL bytes in it"),
        ("a.jsonl", LINES.encode()[:-20], "(the row is cut off)"),
        ("a.jsonl", CHINESE.encode()[:-4], "ends within a character (truncated?)"),
        ("a.json", json.dumps(ROWS).encode()[:-20], "(the row is cut off)"),
        ("a.json", json.dumps({"data": ROWS}).encode(), "may be in its 'data'"),
        ("a.parquet", LINES.encode(), "perhaps JSON lines"),
        ("a.parquet", b"PAR1" + bytes(9), "truncated"),
    ],
)
def test_a_dataset_that_is_something_else_is_named(tmp_path, name, content, said):
    if name == "a.parquet":
        pytest.importorskip("pyarrow")
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError) as error:
        found = Dataset.at(str(file))
        found.prompts() if name == "a.txt" else found.rows()
    assert error.value.problems[0].startswith(f"{file}:")
    assert said in error.value.problems[0]


def test_one_damaged_byte_does_not_make_utf8_another_encoding(tmp_path):
    content = bytearray((CHINESE * 20).encode())
    content[content.index("颜".encode()) + 1] = 0xFF
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"a.jsonl:1: not UTF-8 text \(byte \d+ is 0x..\)"):
        Dataset.at(str(tmp_path / "a.jsonl")).rows()


@pytest.mark.parametrize("text", ["", "plain", "ä", "你好", "混合 mixed ñ 한국어 日本語", "🙂" * 9])
def test_utf8_text_is_nothing_else(text):
    assert nature(text.encode()) is None
    assert nature(b"\xef\xbb\xbf" + text.encode()) is None


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.jsonl", '{"prompt": "a", "prompt": "z", "response": "b"}\n', 1),
        ("a.jsonl", LINES + '{"prompt": "a", "response": "b", "response": "c"}\n', 5),
        (
            "a.jsonl",
            '{"messages": [{"role": "user", "content": "a", "content": "b"}]}\n',
            1,
        ),
        ("a.json", '[{"prompt": "a", "response": "b"},\n{"prompt":"a","prompt":"z"}]', 2),
    ],
)
def test_a_key_twice_is_refused_with_its_row(tmp_path, name, content, line):
    file = tmp_path / name
    file.write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as error:
        Dataset.at(str(file)).rows()
    assert error.value.problems[0].startswith(f"{file}:{line}: the key '")
    assert "given twice" in error.value.problems[0]
    good = len(content.splitlines()) - 1
    if good:
        assert len(Dataset.at(str(file)).rows(skip_bad_rows=True)) == good


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"prompt": "a\\u0000b", "response": "c"}\n'),
        ("a.jsonl", b'{"prompt": "a", "response": "c\\u0000"}\n'),
        ("a.csv", b"prompt,response\na\0b,c\n"),
        ("a.txt", b"first\nsec\0nd\n"),
    ],
)
def test_a_nul_character_is_no_text(tmp_path, name, content):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}:\d: .*NUL character"):
        found = Dataset.at(str(file))
        found.prompts() if name == "a.txt" else found.rows()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("training: {batch_size: yes}", "c.yaml:1:12: training.batch_size: expected a number"),
        ("training: {batch_size: no}", "training.batch_size: expected a number, not yes or no"),
        ("lora: {alpha: on}", "lora.alpha: expected a number"),
        ("trainer: {devices: true}", "trainer.devices: expected a number"),
        ("schedule: {name: constant, learning_rate: yes}", "schedule.learning_rate: expected a nu"),
        ("training: {batch_size: 010}", "c.yaml:1:24: 010 is 8 in YAML"),
        ("seed: 1:30", "c.yaml:1:7: 1:30 is 90 in YAML"),
    ],
)
def test_a_number_that_yaml_reads_as_another_is_refused(tmp_path, text, said):
    file = tmp_path / "c.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load(LoraTrainConfig, file, environment={})
    assert len(error.value.problems) == 1
    assert said in error.value.problems[0]


def test_a_number_of_a_setting_or_the_environment_is_refused_alike():
    for layer in ({"settings": ["seed=010"]}, {"environment": {"LORAGEN_SEED": "010"}}):
        with pytest.raises(UsageError, match="010 is 8 in YAML"):
            load(LoraTrainConfig, **{"environment": {}, **layer})
    with pytest.raises(ConfigError, match=r"data\.batch_size: expected a number"):
        load(GenTrainConfig, settings=["data.batch_size=yes"], environment={})


def test_all_problems_are_said_at_once_with_a_yes_among_them(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("training: {batch_size: yes, bogus: 1}\nseed: -1", encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load(LoraTrainConfig, file, environment={})
    assert len(error.value.problems) == 3


def test_switches_may_still_be_yes_and_numbers_hexadecimal(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("data: {skip_bad_rows: yes}\nseed: 0x10", encoding="utf-8")
    config = load(LoraTrainConfig, file, environment={})
    assert (config.data.skip_bad_rows, config.seed) == (True, 16)


@pytest.mark.parametrize("encoding", ["utf-16", "gb18030"])
def test_a_configuration_in_another_encoding_is_named(tmp_path, encoding):
    file = tmp_path / "c.yaml"
    file.write_bytes("base_model: 模型在这里 # 颜色\n".encode(encoding))
    with pytest.raises(ConfigError, match=f"c.yaml: not UTF-8 text; it is {encoding.upper()}"):
        load(LoraTrainConfig, file, environment={})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"r": 4, "r": 8}', "the key 'r' is given twice"),
        (b'{"r": 4', "the file ends there: truncated"),
        (b"", "it is empty"),
        ('{"r": 4}'.encode("utf-16"), "UTF-16"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (bytes(30), "NUL bytes"),
    ],
)
def test_a_json_file_of_settings_is_read_as_strictly(tmp_path, content, said):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.json.*" + said):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("length", [300, 5000])
def test_a_name_that_is_too_long_is_one_short_line(tmp_path, length):
    with pytest.raises(LoragenError) as error:
        Dataset.find("x" * length, tmp_path)
    assert len(error.value.problems) == 1
    assert "too long" in str(error.value)
    assert len(str(error.value)) < 200
    with pytest.raises(UsageError, match="NUL"):
        Dataset.find("a\0b", tmp_path)


# ---------------------------------------------------------------------------- streams


@pytest.fixture
def pipe():
    """`pipe(bytes)` returns the name of a pipe with that content, as `<(command)` gives it."""
    if not os.path.isdir("/dev/fd"):  # noqa: PTH112
        pytest.skip("no /dev/fd here")
    ends = []

    def make(content):
        read, write = os.pipe()
        os.write(write, content)
        os.close(write)
        ends.append(read)
        return f"/dev/fd/{read}"

    yield make
    for end in ends:
        os.close(end)


@pytest.mark.parametrize("content", [LINES, json.dumps(ROWS), "\ufeff" + LINES])
def test_rows_may_come_through_a_pipe_and_are_read_once(pipe, tmp_path, content):
    dataset = Dataset.find(pipe(content.encode()), tmp_path)
    assert [row.response for row in dataset.rows()] == [row["response"] for row in ROWS]
    dataset.release()
    assert len(dataset.prompts()) == 4


def test_prompts_may_come_through_a_pipe_a_line_each(pipe):
    assert Dataset.at(pipe(b"first, one\nsecond\n")).prompts() == ["first, one", "second"]


def test_a_training_does_not_take_a_pipe_that_its_resuming_could_not_read(pipe):
    config = load(LoraTrainConfig, environment={})
    with pytest.raises(UsageError, match="save the stream as a file"):
        find_tasks(config, [pipe(LINES.encode())], every=False)


def test_a_configuration_may_come_through_a_pipe(pipe):
    from pathlib import Path

    assert load(LoraTrainConfig, Path(pipe(b"seed: 7")), environment={}).seed == 7
