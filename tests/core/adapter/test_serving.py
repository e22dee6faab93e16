"""What servers make of adapters: their rules, and the form in which nothing is lost."""

import json
import re

import pytest
import torch
from safetensors import safe_open

from loragen.core.adapter.algebra import modules, norm
from loragen.core.adapter.checks import check_factors, module_scaling
from loragen.core.adapter.export import export_adapter, prepare_export
from loragen.core.adapter.files import Adapter, read_adapter
from loragen.core.adapter.serving import NAMES, VLLM_RANKS, for_server, obstacles, server_notes
from loragen.core.errors import LoragenError
from loragen.core.generator.model import Generator
from loragen.testing.adapters import peft_adapter

SCALED = {
    "rslora": {"use_rslora": True},
    "alpha pattern": {"alpha_pattern": {"v_proj": 3}},
    "rank pattern": {"rank_pattern": {"v_proj": 2}},
    "all three": {
        "use_rslora": True,
        "alpha_pattern": {"q_proj": 5},
        "rank_pattern": {"layers.0.self_attn.q_proj": 8},
    },
    "regular expression": {"target_modules": r".*\.[qv]_proj"},
    "paths": {"target_modules": ["self_attn.q_proj", "self_attn.v_proj"]},
}
WRONG = {
    "rslora": {"sglang", "llama.cpp"},
    "alpha pattern": set(NAMES),
    "rank pattern": {"vllm", "sglang", "lorax"},
    "all three": set(NAMES),
    "regular expression": {"sglang"},
    "paths": {"sglang"},
}


def changes(adapter, scaling):
    """{module: factors of ΔW}, with `scaling(module)`."""
    return {
        name: (a.double(), b.double() * scaling(name)) for name, (a, b) in modules(adapter.tensors)
    }


@pytest.fixture(params=SCALED)
def scaled(request, tmp_path):
    return request.param, read_adapter(peft_adapter(tmp_path / "theirs", **SCALED[request.param]))


class TestScaling:
    def test_the_servers_that_scale_it_wrongly_are_named(self, scaled):
        kind, adapter = scaled
        found = {server for server, several in obstacles(adapter).items() if several}
        assert found == WRONG[kind]
        assert all("--for" in line for line in server_notes(adapter))

    def test_one_scaling_for_all_gives_the_same_change(self, scaled):
        _, adapter = scaled
        plain = for_server(adapter, "vllm")
        config = plain.config
        assert not any(obstacles(plain).values())
        assert isinstance(config["lora_alpha"], int)
        assert not {"use_rslora", "alpha_pattern", "rank_pattern"} & set(config)
        check_factors(config, plain.tensors, "plain")
        wanted = changes(adapter, lambda name: module_scaling(adapter.config, name))
        ours = changes(plain, lambda _: config["lora_alpha"] / config["r"])
        assert wanted.keys() == ours.keys()
        for name, (a, b) in wanted.items():
            other_a, other_b = ours[name]
            difference = (torch.cat([a, other_a]), torch.cat([b, -other_b], dim=1))
            assert norm(difference) < 1e-6 * norm((a, b))

    def test_peft_computes_the_same(self, scaled, tmp_path):
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        _, adapter = scaled
        base = adapter.config["base_model_name_or_path"]
        plain = for_server(adapter, "vllm")
        export_adapter(prepare_export(plain, tmp_path, None, None), tmp_path, tmp_path / "ours")
        ids = torch.tensor([[5, 6, 7, 8]])
        logits = []
        for place in ("theirs", "ours"):
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            with torch.inference_mode():
                logits.append(PeftModel.from_pretrained(model, tmp_path / place)(ids).logits)
        assert (logits[0] - logits[1]).abs().max() < 1e-4

    def test_half_precision_is_not_rounded_again(self, tmp_path):
        theirs = peft_adapter(tmp_path / "theirs", dtype="bfloat16", alpha_pattern={"v_proj": 3})
        adapter = read_adapter(theirs)
        plain = for_server(adapter, "vllm")
        dtypes = {key.rsplit(".", 3)[1]: set() for key in plain.tensors if "lora_B" in key}
        for key, tensor in plain.tensors.items():
            if "lora_B" in key:
                dtypes[key.rsplit(".", 3)[1]].add(tensor.dtype)
        assert dtypes == {"q_proj": {torch.bfloat16}, "v_proj": {torch.float32}}


@pytest.mark.parametrize("options", [
    {"use_dora": True},
    {"modules_to_save": ["lm_head"]},
    {"bias": "all"},
    {"init_lora_weights": "pissa"},
], ids=lambda options: next(iter(options)))  # fmt: skip
def test_what_is_not_ba_has_no_form_for_a_server(options, tmp_path):
    adapter = read_adapter(peft_adapter(tmp_path / "theirs", **options))
    assert all(obstacles(adapter).values())
    for server in NAMES:
        with pytest.raises(LoragenError, match="--merge"):
            for_server(adapter, server)


def test_a_rank_above_the_highest(tmp_path):
    config = {"r": 600, "lora_alpha": 600, "target_modules": ["q_proj"]}
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    tensors = {key.format("A"): torch.ones(600, 8), key.format("B"): torch.ones(8, 600)}
    found = obstacles(Adapter(config, tensors))
    assert [server for server, several in found.items() if several] == ["vllm"]


def test_a_kind_of_module_that_some_layers_lack():
    config = {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj"]}
    tensors = {}
    for module in ("0.self_attn.q_proj", "1.self_attn.q_proj", "1.self_attn.v_proj"):
        for matrix, shape in (("A", (2, 8)), ("B", (8, 2))):
            key = f"base_model.model.model.layers.{module}.lora_{matrix}.weight"
            tensors[key] = torch.ones(shape)
    found = obstacles(Adapter(config, tensors))
    assert [server for server, several in found.items() if several] == ["lorax"]


class TestOurs:
    """Every adapter that loragen writes is one that vLLM takes and scales as PEFT does."""

    @pytest.fixture(params=["trained", "generated", "exported"])
    def ours(self, request, run, experiment, tmp_path):
        if request.param == "trained":
            return run / "adapter"
        if request.param == "generated":
            return Generator.load(experiment).generate("Question 1 about red?").save(tmp_path / "g")
        export_adapter(read_adapter(run / "adapter"), run, tmp_path / "e")
        return tmp_path / "e"

    @pytest.fixture
    def run(self, collection):
        return collection.runs["colors"]

    def test_it_keeps_the_rules_of_vllm(self, ours):
        config = json.loads((ours / "adapter_config.json").read_text(encoding="utf-8"))
        assert config["peft_type"] == "LORA"
        assert config["r"] <= max(VLLM_RANKS)
        assert config["lora_alpha"] > 0
        assert config["bias"] == "none"
        assert not config["modules_to_save"]
        assert not config["use_dora"]
        assert not config["rank_pattern"]
        assert not config["alpha_pattern"]
        names = config["target_modules"]
        assert isinstance(names, list)
        form = re.compile(r"base_model\.model\.(.+\.)?(\w+)\.lora_([AB])\.weight")
        with safe_open(ours / "adapter_model.safetensors", "pt") as file:
            for key in file.keys():  # noqa: SIM118  # it is no dictionary
                found = form.fullmatch(key)
                assert found, key
                assert any(f".{found[1]}{found[2]}".endswith(f".{name}") for name in names)
                rank = file.get_slice(key).get_shape()[0 if found[3] == "A" else 1]
                assert rank == config["r"], key
            metadata = file.metadata()
        assert metadata["base_model"] == config["base_model_name_or_path"]
        assert float(metadata["lora_alpha"]) == config["lora_alpha"]
        assert metadata["rank"] == str(config["r"])

    def test_every_server_takes_it_as_it_is_but_for_paths_of_modules(self, ours):
        """PEFT writes paths for all-linear on a base of fewer than 20 linear layers."""
        adapter = read_adapter(ours)
        found = {server for server, several in obstacles(adapter).items() if several}
        assert found <= {"sglang"}
        plain = for_server(adapter, "sglang")
        assert server_notes(plain) == []
        assert all(plain.tensors[key].equal(adapter.tensors[key]) for key in adapter.tensors)
