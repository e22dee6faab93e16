import pytest
import torch
from safetensors.torch import save_file

from loragen.core.errors import DataError, UsageError
from loragen.legacy.checkpoints import converted_optimizer, read_foreign_checkpoint
from loragen.legacy.facts import facts_of


def values(facts):
    return {name: fact.value for name, fact in facts.items()}


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.model.layers.0.q_proj.lora_A.weight",
        "base_model.model.model.layers.0.q_proj.lora_A.default.weight",
        "model.base_model.model.model.layers.0.q_proj.lora_A.default.weight",
        "module.base_model.model.model.layers.0.q_proj.lora_A.mine.weight",
        "_orig_mod.module.base_model.model.model.layers.0.q_proj.lora_A.default",
        "model.layers.0.q_proj.lora_A",
        "model.model.layers.0.q_proj.lora_A.weight",
        "layers.0.q_proj.lora_A",
    ],
)
def test_the_forms_of_a_key(tmp_path, key):
    torch.save({"model": {key: torch.ones(2, 4), "other": torch.ones(1)}}, tmp_path / "a.pt")
    save_file({key: torch.ones(2, 4), "other": torch.ones(1)}, tmp_path / "a.safetensors")
    for file in tmp_path.iterdir():
        (found,) = read_foreign_checkpoint(file).tensors
        assert found == "base_model.model.model.layers.0.q_proj.lora_A.weight"


@pytest.mark.parametrize("key", ["a.lora_embedding_A", "a.lora_magnitude_vector", "lora_A"])
def test_what_is_not_known_is_refused_by_name(tmp_path, key):
    torch.save({key: torch.ones(2, 4)}, tmp_path / "a.pt")
    with pytest.raises(DataError, match=f"a.pt: {key} is not a matrix of LoRA"):
        read_foreign_checkpoint(tmp_path / "a.pt")


def test_of_several_adapters_the_default_one(tmp_path):
    keys = [f"m.lora_A.{name}.weight" for name in ("default", "other")]
    torch.save({key: torch.full((2, 4), float(i)) for i, key in enumerate(keys)}, tmp_path / "a.pt")
    (tensor,) = read_foreign_checkpoint(tmp_path / "a.pt").tensors.values()
    assert not tensor.any()
    torch.save({f"m.lora_A.{name}": torch.ones(2, 4) for name in "xy"}, tmp_path / "b.pt")
    with pytest.raises(DataError, match="several adapters in it, none is 'default': x, y"):
        read_foreign_checkpoint(tmp_path / "b.pt")


def test_what_was_saved_with_the_weights(tmp_path):
    document = {
        "model": {"m.lora_A": torch.ones(2, 4)},
        "optimizer": {"param_groups": [{"weight_decay": 0.01}]},
        "config": {"training": {"batch_size": 16}},
        "lora_config": {"alpha": 32},
        "step": torch.tensor(7),
    }
    torch.save(document, tmp_path / "a.pt")
    checkpoint = read_foreign_checkpoint(tmp_path / "a.pt")
    assert checkpoint.step == 7
    assert values(facts_of(checkpoint.facts, "a.pt")) == {
        "lora.alpha": 32,
        "training.batch_size": 16,
        "training.weight_decay": 0.01,
    }


def test_a_model_in_shards(tmp_path):
    for index, matrix in enumerate("AB", 1):
        name = f"model-0000{index}-of-00002.safetensors"
        save_file({f"m.lora_{matrix}.weight": torch.ones(2, 2)}, tmp_path / name)
    assert len(read_foreign_checkpoint(tmp_path).tensors) == 2


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    for index in (1, 2):
        name = f"model-0000{index}-of-00002.safetensors"
        save_file({"m.lora_A.weight": torch.full((2, 2), float(index))}, tmp_path / name)
    with pytest.raises(DataError, match=r"00002-of-.*: m\.lora_A\.weight is in another shard"):
        read_foreign_checkpoint(tmp_path)


def test_a_folder_of_checkpoints_is_none(tmp_path):
    for step in (1, 2):
        save_file({"m.lora_A.weight": torch.ones(2, 2)}, tmp_path / f"model_{step}.safetensors")
    with pytest.raises(UsageError, match="2 checkpoints in it, name one: model_1"):
        read_foreign_checkpoint(tmp_path)


def test_a_full_model_is_not_loaded(tmp_path, monkeypatch):
    """The base's 64 MiB stay in the file."""
    psutil = pytest.importorskip("psutil")
    big = {"base.weight": torch.ones(4096, 4096), "m.lora_A.weight": torch.ones(2, 4)}
    torch.save({"model_state_dict": big}, tmp_path / "full.pt")
    save_file(big, tmp_path / "full.safetensors")
    del big
    for file in ("full.pt", "full.safetensors"):
        before = psutil.Process().memory_info().rss
        kept = read_foreign_checkpoint(tmp_path / file)
        assert psutil.Process().memory_info().rss - before < 16 * 2**20
        assert kept.tensors["base_model.model.m.lora_A.weight"].untyped_storage().nbytes() == 32


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s["state"].pop(0),
        lambda s: s["state"][0].update(max_exp_avg_sq=torch.ones(2, 2)),
        lambda s: s["state"][0].update(exp_avg=torch.ones(3, 2)),
        lambda s: s["state"][0].update(exp_avg=torch.full((2, 2), float("nan"))),
        lambda s: s.pop("state"),
        lambda s: s["param_groups"][0].update(decoupled_weight_decay=False),
        lambda s: s["param_groups"][0].pop("params"),
        lambda s: s["state"][0].update(exp_avg=1.0),
    ],
)
def test_an_optimizer_that_does_not_fit_is_left_out(change):
    tensors = {"a": torch.zeros(2, 2, requires_grad=True)}
    frozen = torch.zeros(5, requires_grad=True)
    optimizer = torch.optim.AdamW([frozen, *tensors.values()], lr=0.1)
    tensors["a"].sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    assert converted_optimizer(state, tensors, 0.1)["param_groups"][0]["params"] == [0]
    state["state"] = {0: state["state"][1]}
    state["param_groups"][0]["params"] = [0]
    change(state)
    assert converted_optimizer(state, tensors, 0.1) is None
