import shutil
from pathlib import Path

import pytest
import torch

from loragen.core.base.load import empty_base, is_local, load_base, load_tokenizer
from loragen.core.base.names import resolve_base
from loragen.core.errors import LoragenError, UsageError


def test_the_shipped_base_is_a_directory():
    assert (Path(resolve_base("demo")) / "config.json").is_file()


def test_a_directory_is_taken_as_it_is(base_dir, monkeypatch):
    assert resolve_base(str(base_dir)) == str(base_dir)
    monkeypatch.chdir(base_dir.parent)
    assert resolve_base(base_dir.name) == base_dir.name


def test_a_hub_id_is_passed_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("Qwen/Qwen2.5-0.5B-Instruct", "gpt2"):
        assert resolve_base(name) == name


@pytest.mark.parametrize("name", ["./none", "../none", "/none", "~/none", "a/b/c", "models\\qwen"])
def test_a_path_that_is_not_there_is_no_hub_id(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no such directory") as error:
        resolve_base(name)
    assert name in str(error.value)


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"no config\.json"):
        resolve_base(str(tmp_path))


def test_a_base_is_loaded_frozen_in_eval_mode_and_its_stored_type(base):
    assert base.dtype == torch.float32
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())
    assert base.tokenizer.decode(base.tokenizer("red cat").input_ids) == "red cat"


@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float64])
def test_a_base_is_loaded_in_the_type_asked_for(base_dir, wanted):
    base = load_base(str(base_dir), wanted)
    assert {p.dtype for p in base.model.parameters()} == {wanted}
    assert base.dtype == torch.float32  # what is stored


def test_the_tokenizer_that_is_loaded_is_the_one_that_was_saved(base, tokenizer):
    """AutoTokenizer would replace the wrong class's pre-tokenizer without a word."""
    for text in ("Question 12 about red?", " a  b\n\tc 2026", "naïve 猫"):
        assert base.tokenizer(text).input_ids == tokenizer(text).input_ids


@pytest.mark.parametrize("missing", ["model.safetensors", "tokenizer.json"])
def test_missing_files_are_one_line_that_names_the_base(base_dir, tmp_path, missing):
    broken = shutil.copytree(base_dir, tmp_path / "broken")
    for file in (missing, "tokenizer_config.json" if "tokenizer" in missing else missing):
        (broken / file).unlink(missing_ok=True)
    with pytest.raises(LoragenError) as error:
        load_base(str(broken))
    assert str(broken) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "file, text",
    [
        ("config.json", "{"),
        ("config.json", '{"model_type": "none-such"}'),
        ("model.safetensors", "not a tensor"),
    ],
)
def test_broken_files_are_one_line_that_names_the_base(base_dir, tmp_path, file, text):
    broken = shutil.copytree(base_dir, tmp_path / "broken")
    (broken / file).write_text(text, encoding="utf-8")
    with pytest.raises(LoragenError) as error:
        load_base(str(broken))
    assert str(broken) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_hub_id_that_cannot_be_had_is_a_usage_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no-one/no-such-model: not a directory") as error:
        load_base("no-one/no-such-model")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("look", [load_base, empty_base, load_tokenizer])
def test_a_hub_that_does_not_answer_is_asked_once(tmp_path, monkeypatch, look):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("loragen.core.base.load.silence", lambda: "the hub does not answer")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def asked(*_, **__):
        raise AssertionError

    monkeypatch.setattr("socket.getaddrinfo", asked)
    with pytest.raises(UsageError, match="not a directory, and the hub does not answer"):
        look("no-one/no-such-model")


def test_a_tokenizer_is_loaded_without_the_model(base_dir, tmp_path):
    copy = shutil.copytree(base_dir, tmp_path / "copy")
    (copy / "model.safetensors").unlink()
    tokenizer = load_tokenizer(str(copy))
    assert tokenizer("red cat").input_ids == load_base(str(base_dir)).tokenizer("red cat").input_ids
    with pytest.raises(UsageError, match="no-one/none: not a directory, and the hub says"):
        load_tokenizer("no-one/none")


def test_whether_a_base_is_on_this_machine(base_dir, tmp_path):
    assert is_local("demo")
    assert is_local(str(base_dir))
    assert not is_local(str(tmp_path / "none"))
    assert not is_local("no-one/none")


@pytest.mark.parametrize(
    ("files", "here"),
    [
        (["config.json"], False),  # of a dry run
        (["config.json", "model.safetensors"], True),
        (["config.json", "model.safetensors.index.json"], True),
        (["config.json", "pytorch_model.bin"], True),
    ],
)
def test_a_base_of_the_hub_is_here_with_its_weights(monkeypatch, files, here):
    import huggingface_hub

    def cached(_, file):
        return f"cache/{file}" if file in files else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    assert is_local("some/model") is here
