import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from loragen.core.adapter.export import merged_state, save_merged
from loragen.core.adapter.files import (
    Adapter,
    adapter_state,
    attach_adapter,
    plain_config,
    read_adapter,
    read_safetensors,
    shape_mismatch,
    write_adapter,
    write_safetensors,
)
from loragen.core.errors import DataError, LoragenError, UsageError


@pytest.fixture
def trained(collection):
    return read_adapter(collection.runs["colors"] / "adapter")


def logits(model):
    with torch.inference_mode():
        return model(torch.arange(12).view(2, 6)).logits


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)


def test_reading_returns_what_was_written(tmp_path, trained):
    for name in ("half", "turned"):
        trained.tensors[f"base_model.model.{name}.lora_A.weight"] = torch.rand(2, 3).bfloat16()
        trained.tensors[f"base_model.model.{name}.lora_B.weight"] = torch.rand(2, 3).T
    write_adapter(tmp_path / "new" / "adapter", trained, "# a card\n")
    again = read_adapter(tmp_path / "new" / "adapter")
    assert again.config == trained.config
    assert equal(again.tensors, trained.tensors)
    assert all(again.tensors[k].dtype == t.dtype for k, t in trained.tensors.items())
    assert {f.name for f in (tmp_path / "new" / "adapter").iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip


def test_equal_tensors_and_metadata_make_equal_bytes(tmp_path):
    """safetensors orders metadata at random: of eight writings no two would be alike."""
    tensors = {"m.lora_A.weight": torch.rand(2, 3), "m.lora_B.weight": torch.rand(3, 2)}
    metadata = {f"键{i}": 'a "text"\n' for i in range(9)}
    files = [tmp_path / f"{i}.safetensors" for i in range(8)]
    for file in files:
        write_safetensors(file, tensors, metadata)
    assert len({file.read_bytes() for file in files}) == 1
    again, described = read_safetensors(files[0])
    assert equal(again, tensors)
    assert metadata.items() <= described.items()


def test_a_failed_write_leaves_nothing(tmp_path, trained):
    trained.config["unwritable"] = object()
    with pytest.raises(TypeError):
        write_adapter(tmp_path / "adapter", trained, "")
    assert list(tmp_path.iterdir()) == []


def test_plain_peft_loads_it_without_loragen(tmp_path, trained, base, base_dir):
    write_adapter(tmp_path / "adapter", trained, "")
    code = (
        "import sys, torch; sys.modules['loragen'] = None\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        f"base = AutoModelForCausalLM.from_pretrained({str(base_dir)!r})\n"
        f"model = PeftModel.from_pretrained(base, {str(tmp_path / 'adapter')!r}).eval()\n"
        "with torch.inference_mode():\n"
        "    print(model(torch.arange(12).view(2, 6)).logits.double().sum((0, 1))[:8].tolist())\n"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    ours = logits(attach_adapter(base.model, trained, "x")).double().sum((0, 1))[:8]
    assert ours.tolist() == pytest.approx(json.loads(result.stdout.splitlines()[-1]), abs=1e-4)


def test_an_attached_adapter_changes_the_model_and_is_unloaded_exactly(base, trained):
    before = state(base.model)
    without = logits(base.model)
    model = attach_adapter(base.model, trained, "x")
    assert (logits(model) - without).abs().max() > 1e-3
    assert not model.training
    assert equal(adapter_state(model), trained.tensors)
    unloaded = model.unload()
    assert equal(state(unloaded), before)
    assert logits(unloaded).equal(without)


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda t: t.pop(sorted(t)[0]), r"missing: base_model.*lora_A\.weight"),
        (lambda t: t.update({"base_model.model.x.lora_A.weight": torch.zeros(1)}), "unexpected"),
        (
            lambda t: t.update({k: v[:, :5] for k, v in t.items() if "q_proj.lora_A" in k}),
            r"q_proj\.lora_A\.weight .*\[2, 5\], expected \[2, 32\]",
        ),
        (lambda t: t.clear(), "missing"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_and_the_base_unchanged(
    base, trained, change, reason
):
    before = state(base.model)
    change(trained.tensors)
    with pytest.raises(LoragenError, match=rf"^some/where: .*{reason}") as error:
        attach_adapter(base.model, trained, "some/where")
    assert "\n" not in str(error.value)
    assert equal(state(base.model), before)


def test_fields_that_the_installed_peft_lacks_are_warned_of(base, trained, caplog):
    """An empty one is no option that is in use, and what PEFT itself writes is known."""
    trained.config |= {"scale_by_depth": 2.0, "lora_shift": None, "lora_twist": {}}
    attach_adapter(base.model, trained, "some/where")
    (record,) = caplog.records
    assert record.getMessage().startswith("some/where: ")
    assert "scale_by_depth" in record.getMessage()
    assert "lora_" not in record.getMessage().partition("ignores")[0]


def test_an_adapter_of_the_installed_peft_is_not_warned_of(base, trained, tmp_path, caplog):
    from peft import PeftModel

    write_adapter(tmp_path / "ours", trained, "")
    theirs = PeftModel.from_pretrained(base.model, str(tmp_path / "ours"))
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    plain = theirs.unload()
    caplog.clear()
    attach_adapter(plain, read_adapter(tmp_path / "theirs"), "theirs")
    assert not caplog.records


def test_another_adapter_attaches_after_a_refused_one(base, trained):
    with pytest.raises(LoragenError):
        attach_adapter(base.model, Adapter(trained.config, {}), "x")
    model = attach_adapter(base.model, trained, "x")
    assert equal(adapter_state(model), trained.tensors)


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4},
        {"target_modules": ["q_proj"]},
        {"target_modules": ["no_such_module"]},
    ],
)
def test_a_configuration_that_contradicts_the_tensors_is_refused(base, trained, config):
    before = state(base.model)
    trained.config |= config
    with pytest.raises(LoragenError, match=r"^some/where: "):
        attach_adapter(base.model, trained, "some/where")
    assert equal(state(base.model), before)


@pytest.mark.parametrize(
    "fields",
    [
        {"invented_in_the_future": {"x": 1}},
        {"runtime_config": {"ephemeral_gpu_offload": False}},
        {"base_model_name_or_path": "where/it/was/trained"},
        {"inference_mode": False},
    ],
)
def test_fields_that_do_not_concern_the_weights_are_ignored(base, trained, fields):
    """Those of a newer PEFT, and where the base was when the adapter was written."""
    trained.config |= fields
    model = attach_adapter(base.model, trained, "x")
    assert equal(adapter_state(model), trained.tensors)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(tmp_path, trained, missing):
    write_adapter(tmp_path / "adapter", trained, "")
    (tmp_path / "adapter" / missing).unlink()
    with pytest.raises(UsageError, match=f"adapter.*{missing}"):
        read_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("broken", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_broken_file_is_named_in_one_line(tmp_path, trained, broken):
    write_adapter(tmp_path / "adapter", trained, "")
    (tmp_path / "adapter" / broken).write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=broken) as error:
        read_adapter(tmp_path / "adapter")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "document, reason",
    [
        ({"peft_type": "VERA", "target_modules": ["k_proj"]}, "VERA"),
        ({"peft_type": "LORA", "lora_alpha": 4}, "r must"),
        ({"r": 4}, "lora_alpha must"),
        ([], "list"),
    ],
)
def test_only_lora_adapters_are_read(tmp_path, trained, document, reason):
    write_adapter(tmp_path / "adapter", trained, "")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(DataError, match=f"adapter_config.json: .*{reason}"):
        read_adapter(tmp_path / "adapter")


def test_a_configuration_is_sorted_plain_data():
    from peft import LoraConfig

    modules = {"v_proj", "q_proj", "k_proj", "o_proj"}
    config = plain_config(LoraConfig(r=4, target_modules=modules, task_type="CAUSAL_LM"))
    assert config["target_modules"] == sorted(modules)
    assert list(config) == sorted(config)
    assert config["inference_mode"] is True
    assert json.loads(json.dumps(config)) == config


def test_a_model_with_rslora_and_patterns_is_merged_without_a_change_of_it(base, trained):
    trained.config |= {"use_rslora": True, "alpha_pattern": {"q_proj": 3}}
    model = attach_adapter(base.model, trained, "x")
    before = state(model)
    merged = merged_state(model, torch.float32)
    assert equal(state(model), before)
    reference = model.merge_and_unload().state_dict()
    assert all(torch.allclose(merged[k], reference[k], atol=1e-6) for k in merged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_model_holds_tied_weights_once(base, tmp_path, dtype):
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file

    lora = LoraConfig(r=2, target_modules=["q_proj"])
    save_merged(get_peft_model(base.model, lora), replace(base, dtype=dtype), tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert base.model.config.tie_word_embeddings
    assert "lm_head.weight" not in stored
    assert stored["model.embed_tokens.weight"].dtype == dtype


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_a_merged_model_unties_weights_of_which_the_adapter_changes_one(base, tmp_path, target):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    lora = LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
    model = get_peft_model(base.model, lora).eval()
    save_merged(model, base, tmp_path)
    assert base.model.config.tie_word_embeddings
    merged = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.allclose(logits(merged), logits(model), atol=1e-4)


def test_a_merged_model_that_overflows_is_not_saved(base, trained, tmp_path):
    trained.config["lora_alpha"] = 1e9
    model = attach_adapter(base.model, trained, "x")
    with pytest.raises(
        LoragenError, match=r"^merged into torch.float16, model\.layers\..* has NaN or"
    ):
        save_merged(model, replace(base, dtype=torch.float16), tmp_path)


def test_equal_shapes_have_no_mismatch():
    shapes = {"a": torch.Size([1, 2])}
    assert shape_mismatch(shapes, dict(shapes)) is None
    assert shape_mismatch({}, {}) is None
