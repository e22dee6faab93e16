import json
import shutil
import stat

import pytest
import torch

from loragen.core.adapter.files import attach_adapter, read_adapter
from loragen.core.run.directory import checkpoint_name

IDS = torch.tensor([[5, 9, 13, 2]])


@pytest.fixture
def run(collection):
    return collection.runs["colors"]


@pytest.fixture
def checkpoint(run):
    return run / "checkpoints" / checkpoint_name(8)


@pytest.fixture
def wanted(run, base):
    """What the base says with the adapter."""
    with torch.inference_mode():
        return attach_adapter(base.model, read_adapter(run / "adapter"), "run")(IDS).logits


def loaded(directory):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory).eval()


def test_plain_peft_loads_what_was_exported(loragen, checkpoint, collection, wanted):
    from peft import PeftModel

    result = loragen("lora", "export", checkpoint, "--output", "mine")
    assert result.exit_code == 0, result.output
    assert result.stdout == "mine\n"
    model = PeftModel.from_pretrained(loaded(collection.base), "mine")
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, wanted)
    card = (loragen.work / "mine" / "README.md").read_text(encoding="utf-8")
    assert "rank 2, alpha 4" in card


def test_the_merged_model_says_what_base_and_adapter_say(loragen, run, wanted):
    from transformers import AutoTokenizer

    result = loragen("lora", "export", run, "--output", "mine", "--merge", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["output"], document["kind"]) == ("mine", "merged")
    with torch.inference_mode():
        assert (loaded("mine")(IDS).logits - wanted).abs().max() < 1e-4
    assert AutoTokenizer.from_pretrained("mine")("red").input_ids
    modes = {
        stat.S_IMODE((loragen.work / "mine" / name).stat().st_mode)
        for name in ("model.safetensors", "config.json")
    }
    assert len(modes) == 1


def test_the_merged_model_has_the_dtype_of_the_base(loragen, run, collection, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(collection.base, half)
    loaded(collection.base).to(torch.bfloat16).save_pretrained(half)
    given = ("--merge", "--base-model", half)
    assert loragen("lora", "export", run, "--output", "mine", *given).exit_code == 0
    assert {p.dtype for p in loaded("mine").parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("form", ["torch", "full", "safetensors", "plain"])
def test_a_file_that_no_run_knows(loragen, legacy_run, collection, run, form):
    source = legacy_run(form, yaml=False)
    file = sorted((source / "checkpoints").iterdir())[-1]
    given = ("--alpha", "4", "--base-model", collection.base)
    result = loragen("lora", "export", file, "--output", "mine", *given)
    assert result.exit_code == 0, result.output
    exported, ours = read_adapter(loragen.work / "mine"), read_adapter(run / "adapter")
    assert exported.tensors.keys() == ours.tensors.keys()
    assert all(exported.tensors[key].equal(ours.tensors[key]) for key in ours.tensors)
    assert exported.config["r"] == 2


@pytest.mark.parametrize("form", ["peft", "peft-bin"])
def test_a_peft_directory_knows_itself(loragen, legacy_run, run, form):
    directory = legacy_run(form, yaml=False) / "checkpoints" / "checkpoint-8"
    assert loragen("lora", "export", directory, "--output", "mine").exit_code == 0
    exported, ours = read_adapter(loragen.work / "mine"), read_adapter(run / "adapter")
    assert all(exported.tensors[key].equal(ours.tensors[key]) for key in ours.tensors)


def test_the_shipped_base_is_named_so_that_peft_finds_it(loragen, legacy_run, tmp_path):
    from peft import LoraConfig, get_peft_model

    from loragen.core.base.names import resolve_base

    model = get_peft_model(loaded(resolve_base("demo")), LoraConfig(r=2, target_modules=["q_proj"]))
    weights = {k: v for k, v in model.state_dict().items() if "lora_" in k}
    torch.save(weights, tmp_path / "lone.pt")
    given = ("--alpha", "2", "--base-model", "demo")
    result = loragen("lora", "export", tmp_path / "lone.pt", "--output", "mine", *given)
    assert result.exit_code == 0, result.output
    config = read_adapter(loragen.work / "mine").config
    assert loaded(config["base_model_name_or_path"])
    assert config["target_modules"] == ["q_proj"]
    card = (loragen.work / "mine" / "README.md").read_text(encoding="utf-8")
    assert "ships with loragen" in card


def test_what_is_not_recorded_is_asked_for(fails, legacy_run):
    file = legacy_run(yaml=False) / "checkpoints" / "step_008.pt"
    alpha, base = fails(2, "lora", "export", file, "--output", "mine", lines=2)
    assert "--alpha" in alpha
    assert "--base-model" in base
    error = fails(2, "lora", "export", file, "--output", "mine", "--alpha", "4")
    assert "--base-model" in error


def test_a_file_beside_a_lone_checkpoint_is_of_something_else(fails, legacy_run, collection):
    file = legacy_run(yaml=False) / "checkpoints" / "step_008.pt"
    (file.parent / "deploy.yaml").write_text("model_name: gpt-4\nlora_alpha: 99\n", "utf-8")
    export = ("lora", "export", file, "--output", "mine", "--base-model", collection.base)
    assert "--alpha" in fails(2, *export)


def test_a_folder_says_where_alpha_and_base_are_from(fails, legacy_run, collection):
    folder = legacy_run(yaml=False) / "checkpoints" / "only"
    folder.mkdir()
    shutil.copy(folder.parent / "step_008.pt", folder)
    file = folder / "train.yaml"
    file.write_text(f"model_name: {collection.base}\nlora_alpha: lots\n", encoding="utf-8")
    error = fails(2, "lora", "export", folder, "--output", "mine")
    assert error.startswith(f"{file}:2:1: lora.alpha: input should be a valid number")
    file.write_text(f"model_name: {collection.base}\nlora_alpha: 4\n", encoding="utf-8")
    result = fails.loragen("lora", "export", folder, "--output", "mine")
    assert f"lora.alpha 4 is from {file}:2:1\n" in result.stderr


def test_an_adapter_of_another_base(fails, run):
    given = ("--output", "mine", "--merge", "--base-model", "demo")
    assert "does not fit this base model" in fails(1, "lora", "export", run, *given)


def test_nothing_is_replaced_but_an_earlier_output(fails, run, collection, tmp_path):
    export = ("lora", "export", run, "--output", "mine")
    assert fails.loragen(*export).exit_code == 0
    assert "mine exists already" in fails(2, *export)
    assert fails.loragen(*export, "--force").exit_code == 0
    assert "--force replaces only" in fails(2, *export, "--merge", "--force")
    model = shutil.copytree(collection.base, tmp_path / "model")
    error = fails(2, "lora", "export", run, "--output", model, "--merge", "--force")
    assert "--force replaces only earlier outputs" in error


def test_alpha_zero_is_refused(fails, run):
    error = fails(2, "lora", "export", run, "--output", "mine", "--alpha", "0")
    assert error == "--alpha: has to be a number above 0 (got 0)"


def test_an_adapter_that_is_no_lora(fails, run, tmp_path):
    adapter = shutil.copytree(run / "adapter", tmp_path / "ia3")
    (adapter / "adapter_config.json").write_text('{"peft_type": "IA3"}', encoding="utf-8")
    error = fails(1, "lora", "export", adapter, "--output", "mine")
    assert "adapter_config.json: peft_type is IA3" in error


def test_one_layer_of_the_merged_model_at_a_time(run, base, monkeypatch):
    """All ΔW at once would be a second model in memory."""
    import weakref

    from peft.tuners.lora import Linear

    from loragen.core.adapter.export import merged_state

    model = attach_adapter(base.model, read_adapter(run / "adapter"), "run")
    alive = []
    compute = Linear.get_delta_weight

    def counted(layer, name):
        assert sum(one() is not None for one in alive) <= 1
        delta = compute(layer, name)
        alive.append(weakref.ref(delta))
        return delta

    monkeypatch.setattr(Linear, "get_delta_weight", counted)
    merged_state(model, torch.float32)
    assert len(alive) == 14


def test_nothing_there(fails, tmp_path):
    error = fails(2, "lora", "export", "none", "--output", "mine")
    assert error == "none: no such adapter or checkpoint"
    assert "no adapter or checkpoint" in fails(2, "lora", "export", ".", "--output", "mine")
