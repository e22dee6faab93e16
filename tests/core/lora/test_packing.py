"""Packed rows of real architectures, tiny and random: equal to padded ones, or not packed."""

import logging

import pytest
import torch
import transformers

from loragen.core.base.load import load_training_base
from loragen.core.data.dataset import Dataset
from loragen.core.data.tokenize import Example
from loragen.core.lora.packing import Cost, answer_losses, model_cost, packed, packing_cost, padded
from loragen.core.lora.train import train_adapter
from loragen.core.progress import Silent

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256,
    "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PACKED = {
    "qwen2": ("Qwen2", SIZES),
    "qwen3": ("Qwen3", SIZES),
    "llama": ("Llama", SIZES),
    "mistral": ("Mistral", {**SIZES, "sliding_window": 64}),
    "gpt2": ("GPT2", GPT2),
    "gemma2": ("Gemma2", {**SIZES, "sliding_window": 64, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3", {**SIZES, "sliding_window": 64, "query_pre_attn_scalar": 8}),
    "phi3": ("Phi3", SIZES),
    "opt": ("OPT", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2}),
}
PADDED = {
    "bloom": ("Bloom", {**SIZES, "n_layer": 2, "n_head": 4}),
    "mamba": ("Mamba", {**SIZES, "state_size": 4, "time_step_rank": 4}),
    "falcon-alibi": ("Falcon", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2,
                                "num_attention_heads": 4, "alibi": True}),
    "mpt": ("Mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": VOCABULARY,
                    "max_seq_len": 256, "initializer_range": 0.2}),
    "mistral": ("Mistral", {**SIZES, "sliding_window": 8}),
    "gpt-neo": ("GPTNeo", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2,
                "num_heads": 4, "max_position_embeddings": 256, "window_size": 24,
                "attention_types": [[["global", "local"], 1]], "initializer_range": 0.2,
                "bos_token_id": 1, "eos_token_id": 2}),
}  # fmt: skip
EXAMPLES = [
    Example([5, 6, 7, 8, 9, 10, 11, 12, 13], 3),
    Example([5, 6, 7, 8, 20, 21], 1),
    Example([5, 6, 7, 8, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42], 4),
    Example([5, 6, 7, 8, 40, 41, 42], 2),
    Example([5, 6, 7, 8, 9, 44], 1),
]


def tiny(name, settings, attention=None, dtype=torch.float64):
    config_class = getattr(
        transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config"
    )
    model_class = getattr(
        transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    )
    config = config_class(**settings)
    if attention:
        config._attn_implementation = attention
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = model_class(config)
    return model.to(dtype).eval().requires_grad_(False)


def with_lora(model):
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(4)
        lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        return get_peft_model(model, lora, autocast_adapter_dtype=False).eval()


def gradients(model, batch):
    losses = answer_losses(model, batch)
    weights = [p for p in model.parameters() if p.requires_grad]
    flat = torch.autograd.grad(losses.sum(), weights)
    return losses.detach().sort().values, torch.cat([g.flatten() for g in flat])


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # GPT-2's weights lie the other way round
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", PACKED)
def test_losses_and_gradients_are_those_of_padded_rows(kind, attention):
    if (kind, attention) == ("gemma2", "sdpa"):
        pytest.skip("Gemma 2 has no sdpa")
    model = with_lora(tiny(*PACKED[kind], attention))
    assert isinstance(packing_cost(model, EXAMPLES, 0, 5), Cost)
    wanted, gradient = gradients(model, padded(EXAMPLES, 0))
    for pair in (0.0, 1e9):  # in one sequence, and in as many as there are rows
        losses, other = gradients(model, packed(EXAMPLES, 0, Cost(1.0, pair)))
        assert (losses - wanted).abs().max() < 1e-5
        assert (other - gradient).norm() < 1e-5 * gradient.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", PACKED)
def test_rounding_is_no_objection(kind, dtype):
    assert packing_cost(tiny(*PACKED[kind], dtype=dtype), EXAMPLES, 0, 5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", PADDED)
def test_what_cannot_be_packed_is_padded_with_one_notice(kind, dtype, caplog):
    caplog.set_level(logging.INFO, "loragen")
    model = tiny(*PADDED[kind], dtype=dtype)
    assert packing_cost(model, EXAMPLES, 0, 5) is None
    (message,) = [r.getMessage() for r in caplog.records if r.name.startswith("loragen")]
    assert message.startswith("rows are padded, not packed: this base model ")


@pytest.mark.parametrize("kind", ["mamba", "bloom"])
def test_a_single_row_does_not_hide_it(kind):
    """A batch larger than the dataset has it several times."""
    assert packing_cost(tiny(*PADDED[kind]), EXAMPLES[:1], 0, 5) is None


def test_a_window_that_holds_every_row_is_no_objection():
    name, settings = PACKED["mistral"]
    longest = max(len(item.ids) for item in EXAMPLES)
    for window, fits in ((longest, True), (longest - 1, False)):
        model = tiny(name, {**settings, "sliding_window": window})
        assert (packing_cost(model, EXAMPLES, 0, 5) is not None) == fits


def test_the_model_is_asked_in_eval_mode_and_left_as_it_was():
    name, settings = PACKED["gpt2"]
    model = tiny(name, {**settings, "resid_pdrop": 0.5}).train()
    state = torch.get_rng_state()
    base = model.transformer.eval()  # as a loaded base is, inside an adapter that trains
    assert packing_cost(model, EXAMPLES, 0, 5)
    assert model.training
    assert not any(module.training for module in base.modules())
    assert torch.get_rng_state().equal(state)


def test_a_bug_of_ours_is_no_notice(monkeypatch):
    """What fails on padded rows too is not about packing."""
    model = tiny(*PACKED["llama"])
    broken = [Example([5, 6, VOCABULARY + 5], 1)]
    with pytest.raises(IndexError):
        packing_cost(model, broken, 0, 5)


def test_the_cost_counts_the_layers_and_not_the_embeddings():
    cost = model_cost(tiny(*PACKED["llama"]))
    inner = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48  # q, o; k, v; the MLP
    assert cost.token == pytest.approx(2 * inner, rel=0.02)  # and the norms
    assert cost.pair == 4 * 32


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("kind", ["mamba", "gpt2"])
def test_training_runs_either_way(kind, tokenizer, tmp_path, lora_config, dataset, caplog):
    caplog.set_level(logging.INFO, "loragen")
    name, settings = {**PADDED, **PACKED}[kind]
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    sizes = {**settings, "vocab_size": len(tokenizer), **ids}
    tiny(name, sizes, dtype=torch.float32).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    targets = ["in_proj", "x_proj"] if kind == "mamba" else "all-linear"
    config = lora_config(
        {
            "base_model": str(tmp_path / "base"),
            "data.val_ratio": 0.25,
            "lora.target_modules": targets,
        }
    )
    run = train_adapter(config, Dataset(dataset(), "colors"), load_training_base(config), Silent())
    assert run.manifest.status == "success"
    notices = [m for m in caplog.messages if m.startswith("rows are padded, not packed")]
    assert len(notices) == (kind == "mamba")


def test_packed_and_padded_training_are_equal(lora_config, base_dir, dataset):
    from loragen.core.adapter.files import read_adapter

    adapters = []
    for packing in (True, False):
        config = lora_config({"training.packing": packing, "trainer.precision": "64-true"})
        base = load_training_base(config)
        run = train_adapter(config, Dataset(dataset(), "colors"), base, Silent())
        adapters.append(read_adapter(run.directory / "adapter").tensors)
    one, other = adapters
    assert max(float((one[key] - other[key]).abs().max()) for key in one) < 1e-4
