"""Files that are not what they seem: the error names the file and what it is instead."""

import gzip
import io
import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from loragen.cli.main import app
from loragen.core.adapter.files import read_safetensors, write_safetensors
from loragen.core.base import gguf
from loragen.core.base.load import load_base
from loragen.core.config import GenTrainConfig, LoraTrainConfig, load
from loragen.core.contents import nature, read_json
from loragen.core.data.dataset import Dataset
from loragen.core.errors import ConfigError, DataError, LoragenError, UsageError
from loragen.core.files import write_text
from loragen.core.generator.collected import Collected
from loragen.core.learning.arrays import write_once
from loragen.core.lora.provenance import tracking_file
from loragen.core.lora.tasks import find_tasks
from loragen.core.run.checkpoints import load_weights_only
from loragen.core.run.directory import create_run_directory
from loragen.core.run.resume import newest
from tests.faults.damage import cut, flip

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
        ("a.csv", CSV.replace(",", "\t").encode(), "separated by tabs, whose name ends in .tsv"),
        ("a.csv", CSV.replace(",", "|").encode(), "separated by '|'"),
        ("a.csv", CSV.replace(",", ", ").encode(), "the header has ' response'"),
        ("a.csv", b'"prompt";"response"\n"a, b";"c"\n', "separated by semicolons"),
        ("a.csv", CSV.encode() + bytes(50), "NUL bytes in it"),
        ("a.jsonl", LINES.replace("\n", ",\n").encode(), "rows with commas between them"),
        ("a.json", b" ", "no rows in it"),
        ("a.csv", LINES.encode(), "not CSV; it is JSON"),
        ("a.csv", workbook(), "an Excel workbook"),
        ("a.jsonl", json.dumps(ROWS).encode(), "a JSON array, whose name ends in .json"),
        ("a.jsonl", json.dumps(ROWS, indent=1).encode(), "a JSON array, whose name ends in .json"),
        ("a.jsonl", json.dumps(ROWS[0], indent=1).encode(), "JSON over several lines"),
        ("a.jsonl", LINES.replace("\n", "").encode(), "several rows on one line"),
        ("a.jsonl", LINES.replace("\n", "\r").encode(), "end with a carriage return"),
        ("a.jsonl", CSV.encode(), "CSV, whose name ends in .csv"),
        ("a.jsonl", b"{'prompt': 'a', 'response': 'b'}\n", "that Python has printed"),
        ("a.jsonl", gzip.compress(LINES.encode(), mtime=0), "compressed (gzip)"),
        ("a.jsonl", b"<!DOCTYPE html><html>log in</html>", "a web page"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS"),
        ("a.jsonl", b"PAR1" + bytes(9) + b"PAR1", "a Parquet file"),
        ("a.jsonl", bytes(100), "nothing but NUL bytes"),
        ("a.jsonl", LINES.encode() + bytes(100), ":5: not JSON: NUL bytes in it"),
        ("a.jsonl", LINES.encode()[:-20], "(it ends there: truncated?)"),
        ("a.jsonl", CHINESE.encode()[:-4], "ends within a character (truncated?)"),
        ("a.json", json.dumps(ROWS).encode()[:-20], "(it ends there: truncated?)"),
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


def test_rows_under_the_name_of_text_are_warned_of(tmp_path, caplog):
    (tmp_path / "a.txt").write_text(LINES, encoding="utf-8")
    assert Dataset.at(str(tmp_path / "a.txt")).prompts() == LINES.splitlines()
    assert "its lines are rows in JSON" in caplog.text


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
        ("lora: {alpha: .inf}", "lora.alpha: input should be a finite number"),
        ("lora: {alpha: .nan}", "lora.alpha: input should be a finite number"),
        ("schedule: {learning_rate_stage1: .inf}", "stage1: input should be a finite number"),
        ("schedule: {learning_rate_stage1: 1e400}", "stage1: input should be a finite number"),
        ("base_model: no", "base_model: input should be a valid string (got False); put quotes"),
        ("data: {dataset: 2024-01-02}", "; put quotes around it"),
        ("data: {dataset: 2024}", "(got 2024); put quotes around it"),
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
        (b'{"r": 4', "it ends there: truncated"),
        (b'{"base_model": "dem', "it ends there: truncated"),
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
    if not Path("/dev/fd").is_dir():
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
    assert load(LoraTrainConfig, Path(pipe(b"seed: 7")), environment={}).seed == 7


# ---------------------------------------------------------------------------- damaged weights


@pytest.fixture
def checkpoint(tmp_path):
    file = tmp_path / "checkpoint-step-001.ckpt"
    tensors = {"base_model.model.q.lora_A.weight": torch.arange(600.0).reshape(2, 300)}
    torch.save({"state_dict": tensors, "global_step": 1}, file)
    return file


def test_every_flipped_bit_of_a_checkpoint_is_noticed_or_changes_nothing(checkpoint):
    whole = load_weights_only(checkpoint)["state_dict"]["base_model.model.q.lora_A.weight"].clone()
    content = checkpoint.read_bytes()
    noticed = 0
    for at in range(0, len(content), 17):
        damaged = bytearray(content)
        damaged[at] ^= 0x10
        checkpoint.write_bytes(damaged)
        os.utime(checkpoint, ns=(at, at))
        try:
            found = load_weights_only(checkpoint)["state_dict"]["base_model.model.q.lora_A.weight"]
        except DataError as error:
            noticed += 1
            assert str(error).startswith(f"{checkpoint}: ")
            assert "\n" not in str(error)
        else:
            assert torch.equal(found, whole)
    assert noticed > len(content) / 17 / 2


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_checkpoint_is_truncated(checkpoint, share):
    with pytest.raises(DataError, match="empty" if share == 0 else "truncated"):
        load_weights_only(cut(checkpoint, share))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS"),
        (b"<html>log in</html>", "a web page"),
        (b"\x80\x02}q\x00.", "torch.save did not write it; it is a pickle of Python"),
        (bytes(400), "NUL bytes"),
        (safetensors.torch.save({"a": torch.ones(2)}), "a safetensors file"),
    ],
)
def test_a_checkpoint_that_is_something_else_is_named(checkpoint, content, said):
    checkpoint.write_bytes(content)
    with pytest.raises(DataError, match=said):
        load_weights_only(checkpoint)


@pytest.mark.parametrize(
    "pickled", [b"\x80\x02}.q", b"\x80\x02.", b"\x80\x02}(K\x01.", b"\x80\x02}q\x00X\x01", b""]
)
def test_a_pickle_that_breaks_off_is_one_line(checkpoint, pickled):
    """The archive is whole, and its checksums are those of what is in it."""
    with zipfile.ZipFile(checkpoint) as archive:
        members = {one.filename: archive.read(one) for one in archive.infolist()}
    with zipfile.ZipFile(checkpoint, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, pickled if name.endswith("data.pkl") else data)
    try:
        found = load_weights_only(checkpoint)
    except DataError as error:
        assert str(error).startswith(f"{checkpoint}: ")
        assert "\n" not in str(error)
    else:
        assert found == {}


@pytest.mark.parametrize("change", [lambda t: t.to("meta"), lambda t: t.to_sparse()])
def test_a_tensor_without_values_of_its_own_is_named(checkpoint, change):
    torch.save({"optimizer_states": [{"state": {0: change(torch.ones(2, 3))}}]}, checkpoint)
    with pytest.raises(DataError, match=r"a tensor of shape \[2, 3\] in it is (meta|sparse)"):
        load_weights_only(checkpoint)


def test_a_checkpoint_whose_checksums_torch_was_told_to_leave_out_is_read(checkpoint):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"global_step": 1}, checkpoint)
    finally:
        torch.serialization.set_crc32_options(True)
    assert load_weights_only(checkpoint) == {"global_step": 1}


def test_resuming_leaves_a_damaged_checkpoint_out(checkpoint, caplog):
    older = checkpoint.with_name("checkpoint-step-000.ckpt")
    torch.save({"state_dict": {}, "global_step": 0, "optimizer_states": [{}]}, older)
    assert newest([older, flip(checkpoint)]) == older
    assert "damaged" in caplog.text
    assert "looking for an older one" in caplog.text


@pytest.mark.parametrize("damage", [cut, flip])
def test_a_damaged_cache_is_made_anew_with_one_line(tmp_path, caplog, damage):
    file = tmp_path / "tokens" / "a.npy"
    calls = []

    def write():
        calls.append(1)
        np.save(file, np.arange(100))

    write_once([file], write)
    write_once([file], write)
    assert len(calls) == 1
    damage(file)
    write_once([file], write)
    assert len(calls) == 2
    assert np.array_equal(np.load(file), np.arange(100))
    (line,) = caplog.messages
    assert line == f"{file}: damaged or incomplete; it is written again"


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_a_damaged_dequantised_model_is_made_anew_with_one_line(
    tmp_path, monkeypatch, caplog, damage
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def write(file, output):
        output.mkdir()
        (output / "model.safetensors").write_bytes(file.read_bytes() * 9)

    monkeypatch.setattr(gguf, "write_dequantized", write)
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF and some weights")
    directory = gguf.dequantized(file)
    assert gguf.dequantized(file) == directory
    assert len(caplog.messages) <= 1  # that it dequantises
    caplog.clear()
    damage(directory / "model.safetensors")
    assert gguf.dequantized(file) == directory
    assert (directory / "model.safetensors").read_bytes() == file.read_bytes() * 9
    assert f"{directory / 'model.safetensors'}: damaged; it is written again" in caplog.messages


@pytest.fixture
def collected(tmp_path):
    adapters = [np.full((3, 4), float(n), np.float32) for n in range(5)]
    made = Collected(adapters, torch.ones(3, 1))
    made.save(tmp_path / "g.collected.safetensors")
    return made


def test_collected_adapters_are_an_ordinary_safetensors_file(tmp_path, collected):
    tensors = safetensors.torch.load_file(tmp_path / "g.collected.safetensors")
    assert torch.equal(tensors["adapters"][4], torch.full((3, 4), 4.0))


def test_a_damaged_collected_adapter_is_noticed_when_it_is_read(tmp_path, collected):
    file = flip(tmp_path / "g.collected.safetensors", at=0.99)  # in the last adapter
    found = Collected.load(file, collected.scale, collected.fingerprint)
    assert torch.equal(found.read([0, 3], slice(0, 3))[1], torch.full((3, 4), 3.0))
    for read in (lambda: found.read([4], slice(0, 1)), found.mean):
        with pytest.raises(DataError, match="adapter 5 of 5 is not what was written"):
            read()
    collected.save(file)
    assert Collected.load(file, collected.scale, collected.fingerprint).mean()[0, 0] == 2


def test_truncated_collected_adapters_are_named(tmp_path, collected):
    file = cut(tmp_path / "g.collected.safetensors")
    with pytest.raises(
        DataError, match=r"g\.collected\.safetensors: not a file of collected adapters, or damaged"
    ):
        Collected.load(file, collected.scale, collected.fingerprint)


@pytest.fixture
def adapter(tmp_path):
    file = tmp_path / "adapter_model.safetensors"
    write_safetensors(file, {"q.lora_A.weight": torch.arange(600.0).view(2, 300)}, {"format": "pt"})
    return file


def test_a_flipped_bit_of_an_adapter_is_noticed(adapter):
    tensors, metadata = read_safetensors(adapter)
    assert torch.equal(tensors["q.lora_A.weight"], torch.arange(600.0).view(2, 300))
    assert metadata["format"] == "pt"
    with pytest.raises(DataError, match="damaged: its tensors are not those that were written"):
        read_safetensors(flip(adapter, at=0.8))


def test_an_adapter_of_another_program_has_no_checksum_and_is_read(adapter):
    safetensors.torch.save_file({"a": torch.ones(2)}, adapter, {"format": "pt"})
    assert read_safetensors(flip(adapter, at=1.0))[1] == {"format": "pt"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS"),
        (b"<html>log in</html>", "a web page"),
        (b"", "it is empty"),
        (bytes(99), "NUL bytes"),
    ],
)
def test_an_adapter_that_is_something_else_is_named(adapter, content, said):
    adapter.write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_safetensors(adapter)


def test_a_truncated_adapter_is_truncated(adapter):
    with pytest.raises(DataError, match=r"truncated: [\d,]+ bytes are missing"):
        read_safetensors(cut(adapter, 0.7))


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 12\n"


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("model.safetensors", lambda _: LFS, "Git LFS"),
        ("model.safetensors", lambda content: content[:-9], "truncated: 9 bytes are missing"),
        ("model.safetensors", lambda _: b"<html>", "a web page"),
        ("tokenizer.json", lambda _: LFS, "Git LFS"),
        ("tokenizer.json", lambda content: content[:-9], "truncated"),
        ("tokenizer_config.json", lambda _: b"[]", "does not load"),
        ("config.json", lambda content: content.decode().encode("utf-16"), "UTF-16"),
        ("config.json", lambda _: b"", "it is empty"),
    ],
)
def test_the_damaged_file_of_a_base_is_named(base_dir, tmp_path, name, damage, said):
    copy = shutil.copytree(base_dir, tmp_path / "base")
    (copy / name).write_bytes(damage((copy / name).read_bytes()))
    with pytest.raises(LoragenError) as error:
        load_base(str(copy))
    assert said in str(error.value)
    assert name in str(error.value) or said == "does not load"
    assert "\n" not in str(error.value)


LONG = "x" * 300


@pytest.mark.parametrize(
    "line",
    [
        ["ckpt", "analyze", LONG],
        ["lora", "eval", "--dataset", "a.jsonl", "--adapter", LONG],
        ["lora", "train", "--dataset", "a.jsonl", "--base-model", LONG],
        ["lora", "train", "--dataset", LONG],
        ["data", "preview", LONG],
        ["config", "validate", LONG],
        ["gen", "infer", "--prompt", "x", "--model", LONG],
        ["gen", "infer", "--model", "m.pt", "--prompt-file", LONG],
    ],
)
def test_any_name_that_is_too_long_is_one_short_line(tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text(LINES, encoding="utf-8")
    torch.save({}, tmp_path / "m.pt")
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 2, result.output
    (problem,) = result.stderr.splitlines()
    assert problem.endswith("the name is too long")
    assert len(problem) < 200


@pytest.mark.parametrize("stem", ["x" * 240, "颜色" * 40])
def test_a_dataset_with_a_long_name_has_a_run_and_its_tracking(tmp_path, stem):
    (tmp_path / f"{stem}.jsonl").write_text(LINES, encoding="utf-8")
    (tmp_path / f"{stem[:-1]}y.jsonl").write_text(LINES, encoding="utf-8")
    one, other = (Dataset.find(str(file), tmp_path) for file in sorted(tmp_path.glob("*.jsonl")))
    assert one.name != other.name
    assert one.name[:30] == other.name[:30] == stem[:30]
    run = create_run_directory(tmp_path / "runs", f"{one.name}_lora")
    write_text(tracking_file(run, one.name), "")
    write_text(run / f"line_checkpoint_mapping_{one.name}.json", "")


def test_each_command_reads_its_own_standard_input(tmp_path):
    for rows in (1, 2):
        content = "".join(LINES.splitlines(keepends=True)[:rows])
        line = ["data", "preview", "-", "--base-model", "demo", "--json"]
        result = CliRunner().invoke(app, line, input=content)
        assert json.loads(result.stdout)["rows"] == rows
