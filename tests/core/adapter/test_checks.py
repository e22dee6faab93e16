import pytest
import torch

from loragen.core.adapter.checks import (
    changes_nothing,
    check_config,
    check_factors,
    file_keys,
    module_scaling,
    not_ba,
    not_finite,
)
from loragen.core.errors import DataError

A, B = "base_model.model.m.lora_A.weight", "base_model.model.m.lora_B.weight"
CONFIG = {"r": 2, "lora_alpha": 4}


def factors(**changes):
    """An adapter of one module, [5, 3] = B [5, 2] A [2, 3]; a change may be None: left out."""
    tensors = {A: torch.ones(2, 3), B: torch.ones(5, 2)}
    tensors |= {{"a": A, "b": B}[name]: value for name, value in changes.items()}
    return {key: tensor for key, tensor in tensors.items() if tensor is not None}


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 8 / 4**0.5),
        ({"alpha_pattern": {"q_proj": 4}}, 1.0),
        ({"rank_pattern": {r"layers\.\d+\.q_proj": 16}}, 0.5),
        ({"alpha_pattern": {"v_proj": 4}, "rank_pattern": {"proj": 1}}, 2.0),
        ({"alpha_pattern": None}, 2.0),
    ],
)
def test_the_scaling_is_that_of_peft(config, scaling):
    whole = {"r": 4, "lora_alpha": 8, **config}
    assert module_scaling(whole, "model.layers.3.q_proj") == pytest.approx(scaling)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"r": 0}, "r must be a whole number above 0 (it is 0)"),
        ({"r": -4}, "r must be"),
        ({"r": True}, "r must be a whole number above 0 (it is True)"),
        ({"r": 4.0}, "r must be"),
        ({"r": "4"}, "r must be"),
        ({"r": None}, "r must be"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a finite number (it is nan)"),
        ({"lora_alpha": float("-inf")}, "lora_alpha must be"),
        ({"lora_alpha": 10**400}, "lora_alpha must be"),
        ({"lora_alpha": True}, "lora_alpha must be a finite number (it is True)"),
        ({"lora_alpha": "16"}, "lora_alpha must be"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern['q'] must be"),
        ({"rank_pattern": ["q"]}, "rank_pattern must be an object"),
        ({"target_modules": ["q_proj", []]}, "target_modules must be a list of names"),
        ({"target_modules": 3}, "target_modules must be a list of names (it is 3)"),
        ({"alora_invocation_tokens": [None]}, "alora_invocation_tokens must be a list of token"),
        ({"alora_invocation_tokens": 7}, "alora_invocation_tokens must be a list of token ids"),
        ({"rank_pattern": {"(": 4}}, "'(' is not a regular expression"),
        ({"alpha_pattern": {"q": float("inf")}}, "alpha_pattern['q'] must be"),
        ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path must be a string (it is 5)"),
    ],
)
def test_an_impossible_value_of_the_configuration_is_named(change, reason):
    with pytest.raises(DataError) as error:
        check_config({**CONFIG, **change}, "there")
    assert str(error.value).startswith("there: ")
    assert reason in str(error.value)


@pytest.mark.parametrize(
    "config",
    [{}, {"rank_pattern": {}}, {"rank_pattern": None, "alpha_pattern": {"q": 0.5}}, {"x": 1}],
)
def test_a_possible_configuration_is_accepted(config):
    check_config({**CONFIG, **config}, "there")


def test_live_and_lightning_keys_become_those_of_files():
    live = {
        "base_model.model.q_proj.lora_A.default.weight": torch.zeros(1),
        "model.base_model.model.q_proj.lora_B.default.weight": torch.ones(1),
        "base_model.model.q_proj.lora_magnitude_vector.default.weight": torch.ones(1),
        "base_model.model.k_proj.lora_magnitude_vector.weight": torch.ones(1),
        "base_model.model.embed.lora_embedding_A.default": torch.ones(1),
        "base_model.model.q_proj.lora_B.default.bias": torch.ones(1),
    }
    keys = file_keys(live, "x")
    assert set(keys) == {
        "base_model.model.q_proj.lora_A.weight",
        "base_model.model.q_proj.lora_B.weight",
        "base_model.model.q_proj.lora_B.bias",
        "base_model.model.q_proj.lora_magnitude_vector",
        "base_model.model.k_proj.lora_magnitude_vector",
        "base_model.model.embed.lora_embedding_A",
    }
    assert file_keys(keys, "x").keys() == keys.keys()
    other = {key.replace("default", "my-task"): t for key, t in live.items()}
    assert file_keys(other, "x").keys() == keys.keys()


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        (["model.q.lora_A.weight"], "the key model.q.lora_A.weight is not of PEFT's form"),
        ([A, "m.lora_B.weight"], "the key m.lora_B.weight"),
        ([A.replace("A.", "A.one."), A.replace("A.", "A.two.")], "several adapters"),
        ([A, A.replace("A.", "A.default.")], "several adapters"),
    ],
)
def test_keys_that_are_no_adapters_are_named(keys, reason):
    with pytest.raises(DataError, match=r"^there: ") as error:
        file_keys({key: torch.ones(1) for key in keys}, "there")
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({}, "no LoRA tensors"),
        (factors(b=None), f"it has {A} and no {B}"),
        (factors(a=None), f"it has {B} and no {A}"),
        (factors(b=torch.ones(2, 5)), f"{B} has shape [2, 5] (transposed), expected [out, 2]"),
        (factors(a=torch.ones(3, 2)), f"{A} has shape [3, 2] (transposed), expected [2, in]"),
        (factors(a=torch.ones(4, 3), b=torch.ones(5, 4)), "r is 2 for m, and its tensors have r"),
        (factors(a=torch.ones(4, 3)), f"{A} has shape [4, 3], expected [2, in]"),
        (factors(b=torch.ones(5)), f"{B} has shape [5], expected [out, 2]"),
        (factors(a=torch.ones(())), f"{A} has shape [], expected [2, in]"),
        (factors(b=torch.ones(0, 2)), f"{B} has shape [0, 2]"),
        (factors(a=torch.ones(2, 3, dtype=torch.int8)), f"{A}: torch.int8 is not a floating"),
    ],
)
def test_factors_that_contradict_the_rank_are_named(tensors, reason):
    with pytest.raises(DataError, match=r"^there: ") as error:
        check_factors(CONFIG, tensors, "there")
    assert reason in str(error.value)
    if tensors and "r is" not in reason:
        with pytest.raises(DataError):
            check_factors({**CONFIG, "r": 9}, tensors, "there")


def test_ranks_may_differ_as_the_configuration_says():
    check_factors(CONFIG, factors(), "x")
    wide = factors(a=torch.ones(3, 3), b=torch.ones(5, 3))
    check_factors({**CONFIG, "rank_pattern": {"m": 3}}, wide, "x")
    check_factors(None, wide, "x")
    with pytest.raises(DataError, match=r"lora_B\.weight has shape \[5, 2\], expected \[out, 3\]"):
        check_factors(None, factors(a=torch.ones(3, 3)), "x")


@pytest.mark.parametrize(
    ("config", "more", "reason"),
    [
        ({}, {}, None),
        ({"use_dora": False, "bias": "none", "modules_to_save": None}, {}, None),
        ({"init_lora_weights": "gaussian"}, {}, None),
        ({"use_dora": True}, {}, "DoRA: ΔW is not BA"),
        ({"bias": "lora_only"}, {}, "bias: ΔW is not BA"),
        ({"layer_replication": [[0, 1]]}, {}, "layer_replication: ΔW is of other layers"),
        ({"init_lora_weights": "pissa"}, {}, "init_lora_weights pissa: ΔW is not BA"),
        ({}, {"base_model.model.m.lora_magnitude_vector": torch.ones(5)}, "DoRA"),
        ({}, {"base_model.model.m.lora_B.bias": torch.ones(5)}, "lora_bias"),
        ({}, {"base_model.model.m.base_layer.bias": torch.ones(5)}, "bias"),
        ({}, {"base_model.model.m.lora_new": torch.ones(5)}, "other tensors than A and B"),
        ({}, {"base_model.model.embed.weight": torch.ones(5, 2)}, "weights of the base"),
        ({}, {A: torch.ones(2, 3, 1, 1)}, "4 dimensions"),
    ],
)
def test_what_is_not_ba_has_a_reason(config, more, reason):
    found = not_ba({**CONFIG, **config}, {**factors(), **more})
    assert found is None if reason is None else found.startswith(reason) or reason in found


def test_an_embedding_is_ba():
    prefix = "base_model.model.embed.lora_embedding_"
    tensors = {f"{prefix}A": torch.ones(2, 9), f"{prefix}B": torch.ones(4, 2)}
    check_factors(CONFIG, tensors, "x")
    assert not_ba(CONFIG, tensors) is None
    assert not changes_nothing(CONFIG, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn])
def test_nan_is_found_in_every_dtype(dtype):
    bad = torch.tensor([[1.0, float("nan")]]).to(dtype)
    assert not_finite({"good": torch.ones(1, 2).to(dtype), "bad": bad}) == ["bad"]


@pytest.mark.parametrize(
    ("tensors", "nothing"),
    [
        (factors(), False),
        (factors(b=torch.zeros(5, 2)), True),
        (factors(a=torch.zeros(2, 3)), True),
        (factors(b=torch.full((5, 2), 1e-30)), True),
        (factors(b=torch.full((5, 2), 1e-6)), False),
        (factors(b=torch.ones(5, 2).to(torch.float8_e4m3fn)), False),
        (factors(b=torch.full((5, 2), float("nan"))), False),
        ({**factors(b=torch.zeros(5, 2)), "base_model.model.m.lora_B.bias": torch.ones(5)}, False),
    ],
)
def test_an_adapter_changes_nothing_if_every_ba_is_zero(tensors, nothing):
    assert changes_nothing(CONFIG, tensors) is nothing
    assert changes_nothing({**CONFIG, "lora_alpha": 0}, factors())
