"""Adapters that are nothing: NaN, infinity, zero, or never trained. What reads, writes or learns
from one refuses it by name, or says what it is."""

import json
from types import SimpleNamespace

import pytest
import torch

from loragen.core.adapter.checks import check_finite
from loragen.core.adapter.files import read_adapter, write_adapter
from loragen.core.config import GenTrainConfig
from loragen.core.errors import DataError
from loragen.core.learning.callbacks import GeneratorMetrics
from loragen.core.learning.plan import make_plan
from loragen.core.learning.sources import open_sources
from loragen.testing.adapters import broken, peft_adapter, rewritten
from tests.conftest import configured

NOT_FINITE = ["nan", "nan in A", "infinity"]
NOTHING = ["zero", "never moved", "hardly moved"]


@pytest.fixture
def adapters(base_dir, tmp_path, dataset):
    """`adapters({"name": fault or None, ...})`: the sources of `gen train`, one for each name."""

    def make(faults):
        sources = []
        for seed, (name, fault) in enumerate(faults.items()):
            adapter = peft_adapter(tmp_path / name / "step-1", base_dir, seed=seed)
            if fault:
                broken(adapter, fault)
            sources.append({"checkpoints": str(tmp_path / name), "prompts": str(dataset())})
        return sources

    return make


def plan(sources):
    config = configured(
        GenTrainConfig, {"sources": sources, "layout.token_dim": 16, "trainer.accelerator": "cpu"}
    )
    return make_plan(config, open_sources(config))


@pytest.mark.parametrize("fault", NOT_FINITE)
def test_nan_and_infinity_are_refused_where_they_are_read(
    fault, fails, loragen, base_dir, tmp_path, dataset
):
    bad = broken(peft_adapter(tmp_path / "bad", base_dir), fault)
    lines = {
        fails(1, "lora", "eval", "--adapter", bad, "--dataset", dataset()),
        fails(1, "lora", "export", bad, "--output", "out"),
        fails(1, "lora", "export", bad, "--output", "out", "--merge"),
    }
    (line,) = lines
    matrix = "lora_B" if fault == "nan" else "lora_A"
    assert line.startswith(f"{bad}: NaN or infinity in base_model.model.model.layers.1.")
    assert f"v_proj.{matrix}.weight" in line
    analysis = loragen("ckpt", "analyze", bad, "--json")
    assert analysis.exit_code == 1
    (named,) = json.loads(analysis.stdout)["collections"][0]["not_finite"]
    assert matrix in named
    assert f"{bad}: NaN or infinity in " in loragen("ckpt", "test", bad).stderr


@pytest.mark.parametrize("fault", NOT_FINITE)
def test_nan_and_infinity_are_not_learned_from(fault, adapters, tmp_path):
    sources = adapters({"good": None, "bad": fault, "fine": None})
    with pytest.raises(DataError, match=rf"^{tmp_path}/bad/step-1: NaN or infinity in base_model"):
        plan(sources)


def test_nan_in_an_earlier_checkpoint_is_found_too(adapters, base_dir, tmp_path):
    sources = adapters({"one": None, "two": None})
    broken(peft_adapter(tmp_path / "one" / "step-0", base_dir), "nan")
    made = plan(sources)
    first = made.sources[0].checkpoints[0]
    with pytest.raises(DataError, match=r"one/step-0: NaN or infinity in base_model"):
        made.sources[0].read(first)


def test_nan_is_not_written(base_dir, tmp_path):
    adapter = read_adapter(peft_adapter(tmp_path / "good", base_dir))
    key = max(adapter.tensors)
    adapter.tensors[key][0, 0] = float("inf")
    with pytest.raises(DataError, match=rf"out: NaN or infinity in {key}$"):
        write_adapter(tmp_path / "out", adapter, "")
    assert not (tmp_path / "out").exists()


def test_a_generator_that_computes_nan_makes_no_adapter(experiment, monkeypatch):
    from loragen import Generator

    generator = Generator.load(experiment)
    monkeypatch.setattr(
        generator, "_decode", lambda *_: torch.full((generator.layout.tokens, 16), float("nan"))
    )
    with pytest.raises(DataError, match="the generated adapter: NaN or infinity in base_model"):
        generator.generate(["Question 1 about red?"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_dtypes_are_read(dtype, base_dir, tmp_path):
    adapter = read_adapter(peft_adapter(tmp_path / "good", base_dir, dtype=dtype))
    check_finite(adapter.tensors, "x")
    assert {t.dtype for t in adapter.tensors.values()} == {getattr(torch, dtype)}


def test_a_merged_model_that_overflows_its_dtype_is_not_written(
    fails, base_dir, tmp_path, tokenizer
):
    from transformers import AutoModelForCausalLM

    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(base_dir).half().save_pretrained(half)
    tokenizer.save_pretrained(half)
    huge = rewritten(peft_adapter(tmp_path / "huge", half), {"lora_alpha": 1e8})
    text = fails(1, "lora", "export", huge, "--output", "out", "--merge")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert text == f"{huge}: merged into torch.float16, {name} has NaN or infinity"


def test_an_adapter_whose_outputs_overflow_is_refused(fails, base_dir, tmp_path, dataset):
    huge = rewritten(peft_adapter(tmp_path / "huge", base_dir), {"lora_alpha": 1e300})
    text = fails(1, "lora", "eval", "--adapter", huge, "--dataset", dataset())
    assert text == f"{huge}: the model's loss is nan in torch.float32"


@pytest.mark.parametrize("fault", NOTHING)
def test_an_adapter_that_changes_nothing_is_said_to(fault, loragen, base_dir, tmp_path, dataset):
    empty = broken(peft_adapter(tmp_path / "empty", base_dir), fault)
    for arguments in (
        ["lora", "eval", "--adapter", empty, "--dataset", dataset()],
        ["lora", "export", empty, "--output", "out"],
    ):
        result = loragen(*arguments)
        assert result.exit_code == 0, result.output
        assert f"{empty}: the adapter changes nothing" in result.stderr


def test_zero_b_of_some_layers_is_nothing_unusual(loragen, base_dir, tmp_path, dataset):
    some = rewritten(
        peft_adapter(tmp_path / "some", base_dir),
        tensors=lambda t: {k: v * ("layers.1" in k or "lora_A" in k) for k, v in t.items()},
    )
    result = loragen("lora", "eval", "--adapter", some, "--dataset", dataset())
    assert result.exit_code == 0
    assert "nothing" not in result.stderr


@pytest.mark.parametrize("fault", NOTHING)
def test_zero_adapters_teach_nothing(fault, adapters):
    with pytest.raises(DataError, match=r"^nothing to learn: all adapters are zero"):
        plan(adapters({"one": fault, "two": fault, "three": fault}))


def test_a_zero_adapter_among_others_is_named(adapters, caplog):
    plan(adapters({"one": None, "two": "never moved", "three": None}))
    assert "two: the adapter is zero" in caplog.text


def test_equal_adapters_teach_nothing(adapters, base_dir, tmp_path, caplog):
    sources = adapters({"one": None, "two": None, "three": None})
    peft_adapter(tmp_path / "two" / "step-1", base_dir, seed=0)
    assert len(plan(sources).sources) == 3
    assert "one, two: their adapters are equal, bit for bit" in caplog.text
    with pytest.raises(DataError, match=r"^nothing to learn: the adapters of all datasets are eq"):
        plan(sources[:2])


def test_a_training_that_moves_nothing_says_so(train_lora, caplog):
    rates = {"schedule.learning_rate_stage1": 1e-30, "schedule.learning_rate_stage2": 1e-30}
    run = train_lora(rates)
    assert f"{run.directory}: nothing was learned: the loss is" in caplog.text
    assert "the learning rate (1e-30) may be too low" in caplog.text


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_training_that_moves_says_nothing(precision, train_lora, caplog):
    train_lora({"trainer.precision": precision})
    assert "nothing was learned" not in caplog.text


@pytest.mark.parametrize("rate", [1e-30, 1e-2])
def test_a_generator_that_does_not_move_is_said_to(rate, gen_config, caplog):
    from loragen.core.learning.train import train
    from loragen.core.progress import Silent

    run = train(gen_config({"training.learning_rate": rate}), Silent())
    said = f"{run.directory}: nothing was learned: no weight of the generator has moved"
    assert (said in caplog.text) is (rate < 1e-9)
    assert ("the learning rate (1e-30 at most)" in caplog.text) is (rate < 1e-9)


def test_a_weight_of_which_a_part_stays_has_moved(caplog):
    """As the multi-task adapter of `neighbours` does where the collected adapters share A."""
    weight = torch.nn.Parameter(torch.zeros(40, 64))
    module = torch.nn.ParameterList([weight])
    metrics = GeneratorMetrics(SimpleNamespace(directory="run"), phases=None)
    metrics.on_train_batch_start(None, module)
    with torch.no_grad():
        weight[30:] += 1e-3
    metrics.on_train_end(SimpleNamespace(is_global_zero=True, global_step=1), module)
    assert "nothing was learned" not in caplog.text
