import sys
from types import SimpleNamespace

import pytest
import torch

from loragen.core.base import load as precision
from loragen.core.base.load import base_dtype, dtype_name, fast_bfloat16, load_training_base
from loragen.core.data.dataset import Dataset
from loragen.core.errors import ConfigError, UsageError
from loragen.core.lora.train import train_adapter
from loragen.core.progress import Silent
from loragen.core.run.checkpoints import read_tensors
from loragen.core.run.directory import checkpoint_files


def model_of(parameters):
    return SimpleNamespace(parameters=lambda: [torch.empty(parameters, device="meta")])


SMALL, LARGE = model_of(1_000), model_of(precision.FROM_PARAMETERS)


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
        with pytest.raises(UsageError, match=r"needs bitsandbytes: pip install 'loragen\["):
            load_training_base(lora_config({"base_quantization": "4bit"}))

    @pytest.mark.parametrize("accelerator, cuda", [("auto", False), ("cpu", True)])
    def test_without_a_gpu(self, bitsandbytes, lora_config, monkeypatch, accelerator, cuda):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        settings = {"base_quantization": "8bit", "trainer.accelerator": accelerator}
        with pytest.raises(UsageError, match="base_quantization: 8bit needs a CUDA GPU"):
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
            precision, "load_base", lambda _, quantization: asked.update(quantization)
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
        assert {t.dtype for t in read_tensors(file).values()} == {adapter}
        assert run.manifest.base_dtype == dtype_name(base)


def test_a_dtype_that_no_setting_asks_for_has_no_name():
    assert dtype_name(torch.float16) == ""
