import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from loragen.core.base import load as precision
from loragen.core.base.load import (
    base_dtype,
    best_device,
    dtype_name,
    empty_base,
    fast_bfloat16,
    is_local,
    load_base,
    load_tokenizer,
    load_training_base,
)
from loragen.core.base.names import resolve_base
from loragen.core.data.dataset import Dataset
from loragen.core.errors import ConfigError, LoragenError, UsageError
from loragen.core.lora.train import train_adapter
from loragen.core.progress import Silent
from loragen.core.run.checkpoints import load_adapter
from loragen.core.run.directory import checkpoint_files


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
    with pytest.raises(UsageError, match="no-one/no-such-model") as error:
        load_base("no-one/no-such-model")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("look", [load_base, empty_base, load_tokenizer])
def test_a_hub_that_does_not_answer_is_asked_once(tmp_path, monkeypatch, look):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("loragen.core.base.load.hub_problem", lambda: "the hub does not answer")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def asked(*_, **__):
        raise AssertionError

    monkeypatch.setattr("socket.getaddrinfo", asked)
    with pytest.raises(UsageError, match="does not answer"):
        look("no-one/no-such-model")


def test_a_tokenizer_is_loaded_without_the_model(base_dir, tmp_path):
    copy = shutil.copytree(base_dir, tmp_path / "copy")
    (copy / "model.safetensors").unlink()
    tokenizer = load_tokenizer(str(copy))
    assert tokenizer("red cat").input_ids == load_base(str(base_dir)).tokenizer("red cat").input_ids
    with pytest.raises(UsageError, match=r"no-one/none.*hub"):
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


@pytest.mark.parametrize(
    ("cuda", "mps", "chosen"),
    [(True, False, "cuda"), (True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_a_gpu_is_taken_where_there_is_one(monkeypatch, cuda, mps, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert best_device() == torch.device(chosen)


def model_of(parameters):
    return SimpleNamespace(parameters=lambda: [torch.empty(parameters, device="meta")])


SMALL, LARGE = model_of(1_000), model_of(precision.BFLOAT16_FROM)


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(precision, "fast_bfloat16", lambda _: True)


class TestChoice:
    @pytest.mark.parametrize(
        "settings, wanted",
        [
            ({}, torch.float32),
            ({"base_dtype": "bfloat16"}, torch.bfloat16),
            ({"base_dtype": "float32"}, torch.float32),
            ({"trainer.precision": "bf16-true"}, torch.bfloat16),
            ({"trainer.precision": "64-true"}, torch.float64),
            ({"trainer.precision": "bf16-mixed"}, torch.float32),
            ({"trainer.precision": "bf16-mixed", "base_dtype": "bfloat16"}, torch.bfloat16),
        ],
        ids=str,
    )
    def test_of_a_small_base(self, fast, lora_config, settings, wanted):
        assert base_dtype(lora_config(settings), SMALL) == wanted

    def test_a_large_one_is_in_bfloat16_where_that_is_fast(self, lora_config, monkeypatch):
        for is_fast, wanted in ((True, torch.bfloat16), (False, torch.float32)):
            monkeypatch.setattr(precision, "fast_bfloat16", lambda _, f=is_fast: f)
            assert base_dtype(lora_config(), LARGE) == wanted

    def test_what_is_asked_for_counts_more_than_the_size(self, fast, lora_config):
        assert base_dtype(lora_config({"base_dtype": "float32"}), LARGE) == torch.float32
        assert base_dtype(lora_config({"trainer.precision": "64-true"}), LARGE) == torch.float64

    @pytest.mark.parametrize("chosen", ["bf16-true", "64-true"])
    def test_two_answers_to_one_question_are_refused(self, lora_config, chosen):
        with pytest.raises(ConfigError, match="base_dtype auto"):
            lora_config({"trainer.precision": chosen, "base_dtype": "bfloat16"})


class TestHardware:
    @pytest.mark.parametrize("supported", [True, False])
    def test_a_gpu_is_asked(self, monkeypatch, supported):
        asked = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda **kw: asked.append(kw) or supported
        )
        assert fast_bfloat16("auto") is supported
        assert asked == [{"including_emulation": False}]

    def test_a_gpu_that_is_not_used_does_not_count(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
        assert fast_bfloat16("cpu") is False

    def test_apple_s_does_not(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
        assert fast_bfloat16("auto") is False

    @pytest.mark.parametrize(
        "capabilities, wanted",
        [({}, False), ({"avx512_bf16": True}, True), ({"amx_bf16": True}, True),
         ({"avx512_bf16": False, "avx2": True}, False)],
    )  # fmt: skip
    def test_a_cpu_needs_the_instructions(self, monkeypatch, capabilities, wanted):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
        assert fast_bfloat16("cpu") is wanted


class TestQuantization:
    @pytest.fixture
    def bitsandbytes(self, monkeypatch):
        monkeypatch.setattr(precision, "find_spec", lambda _: object())

    def test_without_the_library(self, lora_config, monkeypatch):
        monkeypatch.setattr(precision, "find_spec", lambda _: None)
        with pytest.raises(UsageError, match="bitsandbytes"):
            load_training_base(lora_config({"base_quantization": "4bit"}))

    @pytest.mark.parametrize("accelerator, cuda", [("auto", False), ("cpu", True)])
    def test_without_a_gpu(self, bitsandbytes, lora_config, monkeypatch, accelerator, cuda):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        settings = {"base_quantization": "8bit", "trainer.accelerator": accelerator}
        with pytest.raises(UsageError, match=r"base_quantization.*GPU"):
            load_training_base(lora_config(settings))

    @pytest.mark.parametrize("bits", ["4bit", "8bit"])
    def test_what_transformers_is_asked_for(self, bitsandbytes, lora_config, monkeypatch, bits):
        asked = {}
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setitem(
            sys.modules,
            "transformers",
            SimpleNamespace(BitsAndBytesConfig=lambda **options: options),
        )
        monkeypatch.setattr(
            precision, "load_base", lambda _, quantization, **_options: asked.update(quantization)
        )
        settings = {"base_quantization": bits, "trainer.accelerator": "auto"}
        load_training_base(lora_config(settings))
        assert asked[f"load_in_{bits}"] is True
        if bits == "4bit":
            assert asked["bnb_4bit_quant_type"] == "nf4"


class TestAdapters:
    @pytest.mark.parametrize(
        "settings, base, adapter",
        [
            ({"base_dtype": "bfloat16"}, torch.bfloat16, torch.float32),
            ({"trainer.precision": "bf16-mixed"}, torch.float32, torch.float32),
            ({"trainer.precision": "bf16-true"}, torch.bfloat16, torch.bfloat16),
            ({"trainer.precision": "64-true"}, torch.float64, torch.float64),
        ],
        ids=str,
    )
    def test_their_weights(self, lora_config, dataset, settings, base, adapter):
        config = lora_config({**settings, "training.max_steps": 2, "checkpoints.first_step": 2})
        loaded = load_training_base(config)
        assert {p.dtype for p in loaded.model.parameters()} == {base}
        run = train_adapter(config, Dataset(dataset(), "colors"), loaded, Silent())
        (file,) = checkpoint_files(run.directory)
        assert {t.dtype for t in load_adapter(file).tensors.values()} == {adapter}
        assert run.manifest.base_dtype == dtype_name(base)


def test_a_dtype_that_no_setting_asks_for_has_no_name():
    assert dtype_name(torch.float16) == ""
