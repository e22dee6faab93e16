"""Other people's adapters: what PEFT attaches, loragen uses through PEFT; the rest is refused, with
the file at fault and the reason."""

import json
import shutil

import pytest
import torch

from loragen.core.adapter.checks import OTHER_METHODS, not_ba
from loragen.core.adapter.export import export_adapter, export_merged, prepare_export
from loragen.core.adapter.files import attach_adapter
from loragen.core.base.load import load_base
from loragen.core.config import GenTrainConfig
from loragen.core.errors import DataError, LoragenError, UsageError
from loragen.core.learning.plan import make_plan
from loragen.core.learning.sources import open_sources
from loragen.core.run.checkpoints import load_adapter, read_checkpointed_adapter
from loragen.testing.adapters import FAULTS, KINDS, broken, peft_adapter, rewritten
from tests.conftest import configured

BA = ["plain", "rslora", "patterns", "all-linear", "regex", "one layer", "eva"]
OTHERS = [kind for kind in KINDS if kind not in BA]
UNCHANGED = ["zero", "never moved", "hardly moved"]
"""Faults that are adapters nevertheless."""
NOT_FINITE = ["nan", "nan in A", "infinity"]
IDS = torch.arange(12).view(2, 6)


def logits(model):
    with torch.inference_mode():
        return model.eval()(IDS).logits


def theirs(directory, base_dir, vocabulary=None):
    """What plain PEFT computes with an adapter."""
    from peft import PeftModel

    model = load_base(str(base_dir)).model
    model.config.layer_types = ["full_attention"] * 9  # PEFT leaves those of two layers
    if vocabulary:
        model.resize_token_embeddings(vocabulary)
    return logits(PeftModel.from_pretrained(model, str(directory)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_every_kind_that_peft_attaches_is_attached_and_merged_as_by_peft(kind, base_dir, tmp_path):
    from transformers import AutoModelForCausalLM

    there = peft_adapter(tmp_path / "theirs", base_dir, **KINDS[kind])
    wanted = theirs(there, base_dir)
    base = load_base(str(base_dir)).model
    assert not logits(base).equal(wanted)
    adapter = read_checkpointed_adapter(there)
    assert logits(attach_adapter(base, adapter, "theirs")).equal(wanted)
    assert (not_ba(adapter.config, adapter.tensors) is None) is (kind in BA)
    adapter = prepare_export(adapter, there, str(base_dir), None)
    if kind == "alora":
        with pytest.raises(LoragenError, match=r"PEFT cannot merge it: aLoRA does not support"):
            export_merged(adapter, there, tmp_path / "merged")
        return
    export_merged(adapter, there, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged), wanted, atol=1e-3)


@pytest.mark.parametrize(
    ("tokens", "options"),
    [
        (3, {}),
        (-5, {}),
        (3, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        (3, {"trainable_token_indices": [289]}),
        (3, {"target_modules": ["embed_tokens", "q_proj"]}),
        (3, {"target_modules": ["lm_head", "q_proj"]}),
    ],
    ids=["more", "fewer", "saved", "trained tokens", "embedding", "head"],
)
@pytest.mark.filterwarnings("ignore")
def test_a_resized_vocabulary_comes_with_the_adapter(
    tokens, options, base_dir, tmp_path, tokenizer
):
    """And with its tokenizer, if that lies beside it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    size = len(tokenizer) + tokens
    there = peft_adapter(tmp_path / "theirs", base_dir, vocabulary=size, **options)
    if tokens > 0:
        more = AutoTokenizer.from_pretrained(base_dir)
        more.add_tokens([f"<new-{i}>" for i in range(tokens)])
        more.save_pretrained(there)
    wanted = theirs(there, base_dir, size)
    base = load_base(str(base_dir)).model
    adapter = read_checkpointed_adapter(there)
    assert logits(attach_adapter(base, adapter, "theirs")).equal(wanted)
    prepared = prepare_export(adapter, there, str(base_dir), None)
    export_merged(prepared, there, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged), wanted, atol=1e-3)
    if tokens > 0:
        export_adapter(prepared, there, tmp_path / "exported")
        assert theirs(tmp_path / "exported", base_dir, size).equal(wanted)
        for name in ("merged", "exported"):
            kept = AutoTokenizer.from_pretrained(tmp_path / name)
            assert len(kept("<new-1>").input_ids) == 1


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("dora", "DoRA: ΔW is not BA"),
        ("bias", "bias: ΔW is not BA"),
        ("saved head", "modules_to_save: ΔW is not BA"),
        ("token indices", "trainable_token_indices: ΔW is not BA"),
        ("pissa", "init_lora_weights pissa: ΔW is not BA"),
        (
            "embedding",
            "weights of the base, which PEFT leaves out with save_embedding_layers=False",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_not_ba_is_evaluated_and_not_learned_from(
    kind, reason, loragen, fails, base_dir, tmp_path, dataset
):
    for name in ("one", "two"):
        peft_adapter(tmp_path / "theirs" / name, base_dir, **KINDS[kind])
    one = tmp_path / "theirs" / "one"
    result = loragen("lora", "eval", "--adapter", one, "--dataset", dataset(), "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["rows"] == 12
    for command in (["ckpt", "analyze", one], ["ckpt", "test", one]):
        text = fails(1, *command)
        assert text.startswith(f"{one}: {reason}")
        assert text.endswith("only lora eval and lora export take it")
    source = {"checkpoints": str(tmp_path / "theirs"), "prompts": str(dataset())}
    with pytest.raises(DataError, match="two: ") as error:
        plan([source])
    assert reason in str(error.value)


def plan(sources):
    config = configured(
        GenTrainConfig, {"sources": sources, "layout.token_dim": 16, "trainer.accelerator": "cpu"}
    )
    return make_plan(config, open_sources(config))


@pytest.mark.parametrize("fault", [f for f in FAULTS if f not in (*UNCHANGED, *NOT_FINITE)])
def test_what_is_no_adapter_is_refused_by_every_command_with_the_same_line(
    fault, fails, base_dir, tmp_path, dataset
):
    bad = broken(peft_adapter(tmp_path / "bad", base_dir), fault)
    lines = {
        fails(1, "lora", "eval", "--adapter", bad, "--dataset", dataset()),
        fails(1, "lora", "export", bad, "--output", "out"),
        fails(1, "lora", "export", bad, "--output", "out", "--merge"),
        fails(1, "ckpt", "analyze", bad),
        fails(1, "ckpt", "test", bad),
    }
    (line,) = lines
    assert line.startswith(f"{bad}/adapter_")


@pytest.mark.parametrize("fault", ["B transposed", "only B", "no prefix", "rank half", "nan"])
def test_the_adapter_at_fault_is_the_one_that_gen_train_names(fault, base_dir, tmp_path, dataset):
    sources = []
    for seed, name in enumerate(("good", "bad", "fine")):
        adapter = peft_adapter(tmp_path / name / "step-1", base_dir, seed=seed)
        if name == "bad":
            broken(adapter, fault)
        sources.append({"checkpoints": str(tmp_path / name), "prompts": str(dataset())})
    with pytest.raises(DataError, match=rf"^{tmp_path}/bad/step-1"):
        plan(sources)
    assert len(plan([sources[0], sources[2]]).sources) == 2


def test_an_adapter_of_another_base_is_refused_before_a_training(base_dir, tmp_path, dataset):
    sources = []
    for seed, name in enumerate(("good", "bad")):
        peft_adapter(tmp_path / name / "step-1", base_dir, seed=seed)
        sources.append({"checkpoints": str(tmp_path / name), "prompts": str(dataset())})
    for name in ("good", "bad"):
        rewritten(
            tmp_path / name / "step-1",
            tensors=lambda t: {k.replace("layers.1.", "layers.7."): v for k, v in t.items()},
        )
    with pytest.raises(DataError, match=r"good/step-1: does not fit .*missing: .*layers\.1\."):
        plan(sources)


def test_adapters_of_one_folder_have_one_scaling(base_dir, tmp_path, dataset):
    for seed in (1, 2):
        peft_adapter(tmp_path / "all" / f"step-{seed}", base_dir, seed=seed)
    rewritten(tmp_path / "all" / "step-1", {"use_rslora": True})
    made = plan([{"checkpoints": str(tmp_path / "all"), "prompts": str(dataset())}])
    first = made.sources[0].checkpoints[0]
    with pytest.raises(DataError, match=r"step-1: ΔW is 4 · BA in .*, and 2 · BA in step-2"):
        made.sources[0].read(first)


def test_live_keys_of_any_adapter_name_are_read(base_dir, tmp_path):
    there = peft_adapter(tmp_path / "theirs", base_dir)
    wanted = read_checkpointed_adapter(there).tensors
    for name in ("default", "my_task"):
        live = shutil.copytree(there, tmp_path / name)
        rewritten(
            live,
            tensors=lambda t, name=name: {
                k.replace(".weight", f".{name}.weight"): v for k, v in t.items()
            },
        )
        found = read_checkpointed_adapter(live).tensors
        assert found.keys() == wanted.keys()
        assert all(found[key].equal(tensor) for key, tensor in wanted.items())


def test_weights_in_a_torch_file_are_read(base_dir, tmp_path, loragen, dataset):
    """As an old PEFT wrote them."""
    from safetensors.torch import load_file

    there = peft_adapter(tmp_path / "theirs", base_dir)
    weights = there / "adapter_model.safetensors"
    tensors = load_file(weights)
    torch.save(tensors, there / "adapter_model.bin")
    weights.unlink()
    adapter = read_checkpointed_adapter(there)
    assert adapter.config["r"] == 4
    assert all(adapter.tensors[key].equal(tensor) for key, tensor in tensors.items())
    result = loragen("lora", "eval", "--adapter", there, "--dataset", dataset())
    assert result.exit_code == 0, result.output
    assert plan([{"checkpoints": str(there), "prompts": str(dataset())}]).layout.tokens
    analyzed = loragen("ckpt", "analyze", there.parent)
    assert "1 checkpoint," in analyzed.stdout, analyzed.output


def test_the_scalings_of_patterns_are_reported(base_dir, tmp_path, loragen):
    there = peft_adapter(tmp_path / "theirs", base_dir, **KINDS["patterns"])
    result = loragen("ckpt", "analyze", there)
    assert "; scaling 0.75 to 4\n" in result.stdout, result.output


def test_fields_that_nobody_knows_are_named(base_dir, tmp_path, dataset, caplog):
    there = tmp_path / "theirs" / "one"
    rewritten(peft_adapter(there, base_dir), {"scale_by_depth": 2.0, "empty": None, "off": False})
    plan([{"checkpoints": str(tmp_path / "theirs"), "prompts": str(dataset())}])
    lines = [record.getMessage() for record in caplog.records if "no field" in record.getMessage()]
    assert len(lines) == 1
    assert "no field scale_by_depth and" in lines[0]


@pytest.mark.parametrize("name", ["one.safetensors", "one.pt"])
def test_a_single_file_of_gen_infer_knows_its_configuration(
    name, experiment, loragen, collection, tmp_path
):
    made = loragen(
        "gen", "infer", "--model", experiment, "--prompt", "Question 1?", "--output", name
    )
    assert made.exit_code == 0, made.output
    loragen("gen", "infer", "--model", experiment, "--prompt", "Question 1?", "--output", "dir")
    wanted = load_adapter(loragen.work / "dir")
    found = read_checkpointed_adapter(loragen.work / name)
    assert found.config == wanted.config
    results = [
        loragen("lora", "eval", "--adapter", one, "--dataset", collection.file("colors"), "--json")
        for one in (name, "dir")
    ]
    scores = [json.loads(result.stdout) for result in results]
    assert scores[0]["loss"] == scores[1]["loss"]
    assert loragen("lora", "export", name, "--output", "exported").exit_code == 0
    assert load_adapter(loragen.work / "exported").config["lora_alpha"] == 4
    assert loragen("lora", "export", name, "--output", "merged", "--merge").exit_code == 0
    analysis = loragen("ckpt", "analyze", name, "--json")
    assert json.loads(analysis.stdout)["collections"][0]["scaling"] == 2.0


def test_a_lone_file_without_a_configuration_says_what_to_name(fails, base_dir, tmp_path, dataset):
    there = peft_adapter(tmp_path / "theirs", base_dir)
    lone = shutil.copy(there / "adapter_model.safetensors", tmp_path / "lone.safetensors")
    text = fails(2, "lora", "eval", "--adapter", lone, "--dataset", dataset())
    assert text.startswith(f"{lone}: ")
    assert "adapter_config.json" in text


def test_tensors_that_the_configuration_does_not_name_are_refused(base_dir, tmp_path, dataset):
    """PEFT would leave them out."""
    there = peft_adapter(tmp_path / "theirs" / "one", base_dir)
    rewritten(there, {"target_modules": ["q_proj"]})
    with pytest.raises(DataError, match=r"one: does not fit .* unexpected: .*v_proj\.lora_A"):
        plan([{"checkpoints": str(tmp_path / "theirs"), "prompts": str(dataset())}])
    base = load_base(str(base_dir)).model
    with pytest.raises(LoragenError, match=r"^here: does not fit .*unexpected: .*v_proj\.lora_A"):
        attach_adapter(base, read_checkpointed_adapter(there), "here")


def test_what_holds_adapters_says_to_name_one(fails, base_dir, tmp_path, dataset, collection):
    peft_adapter(tmp_path / "several" / "one", base_dir)
    evaluate = ("lora", "eval", "--dataset", dataset(), "--adapter")
    assert fails(2, *evaluate, tmp_path / "several").endswith("name one of those in it: one")
    runs = collection.runs["colors"]
    assert runs.name in fails(2, *evaluate, runs.parent)
    assert "it is a whole model: name it as --base-model" in fails(2, *evaluate, base_dir)
    assert fails(2, *evaluate, runs.parent).endswith(f"name one: {runs.parent / runs.name}")
    export = ("lora", "export", "--output", tmp_path / "out")
    assert fails(2, *export, runs.parent).endswith(f"name one: {runs.parent / runs.name}")
    assert fails(2, *export, tmp_path / "several").endswith("name one of those in it: one")


def test_an_adapter_in_place_of_a_run_says_how_to_name_it(base_dir, tmp_path, dataset):
    one = peft_adapter(tmp_path / "one", base_dir)
    with pytest.raises(UsageError, match=r"one: a PEFT adapter is no run; .*checkpoints: .*one"):
        plan([{"run": str(one)}])
    (one / "adapter_config.json").unlink()
    with pytest.raises(UsageError, match=r"adapter_config\.json: no such file"):
        plan([{"checkpoints": str(one), "prompts": str(dataset())}])


def test_an_adapter_whose_modules_the_base_lacks_is_refused(base_dir, tmp_path, dataset):
    one = rewritten(peft_adapter(tmp_path / "one", base_dir), {"target_modules": ["wqkv"]})
    with pytest.raises(DataError, match=r"one: does not fit .*wqkv.* not found in the base model"):
        plan([{"checkpoints": str(one), "prompts": str(dataset())}])


@pytest.mark.parametrize("method", OTHER_METHODS)
@pytest.mark.filterwarnings("ignore")
def test_other_methods_are_left_to_peft(method, base_dir, tmp_path, dataset, loragen):
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, get_peft_model
    from transformers import AutoModelForCausalLM

    options = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    more = {"ADALORA": {"total_step": 9}, "IA3": {"feedforward_modules": []}}
    config = PEFT_TYPE_TO_CONFIG_MAPPING[method](**options, **more.get(method, {}))
    with torch.random.fork_rng():
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_dir), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn_like(parameter)
    there = tmp_path / "theirs"
    model.save_pretrained(there)
    wanted = theirs(there, base_dir)
    base = load_base(str(base_dir)).model
    assert not logits(base).allclose(wanted)
    adapter = read_checkpointed_adapter(there)
    assert logits(attach_adapter(base, adapter, "theirs")).equal(wanted)

    exported = loragen("lora", "export", there, "--output", "copy")
    assert exported.exit_code == 0, exported.output
    assert logits(
        attach_adapter(load_base(str(base_dir)).model, load_adapter(loragen.work / "copy"), "copy")
    ).equal(wanted)
    export_merged(prepare_export(adapter, there, None, None), there, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged), wanted, atol=1e-3)
    with pytest.raises(DataError, match=f"theirs: {method}: ΔW is not BA"):
        plan([{"checkpoints": str(there), "prompts": str(dataset())}])
    assert f"{method}: ΔW is not BA" in loragen("ckpt", "analyze", there).stderr
    assert loragen("lora", "export", there, "--output", "x", "--alpha", "3").exit_code == 2
