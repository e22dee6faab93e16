import pytest

from loragen.core.errors import ConfigError
from loragen.legacy.facts import facts_of, yaml_facts


def values(facts):
    return {name: fact.value for name, fact in facts.items()}


def test_the_traditional_and_the_flat_spelling(tmp_path):
    traditional = """
        model: {name: Qwen/Qwen2.5-0.5B-Instruct}
        lora: {r: 8, lora_alpha: 16, lora_dropout: 0.1}
        training:
          per_device_train_batch_size: 4
          gradient_accumulation_steps: 8
          max_steps: 125
          max_grad_norm: 0.5
          bf16: true
          stage1: {steps: 75, learning_rate: 1e-4}
          stage2: {steps: 50, learning_rate: 1e-5}
    """
    flat = """
        model_name: Qwen/Qwen2.5-0.5B-Instruct
        lora: {alpha: 16, dropout: 0.1}
        training: {batch_size: 4, max_steps: 125, stage1_steps: 75, max_grad_norm: 0.5,
                   bf16: true, gradient_accumulation_steps: 8,
                   learning_rate_stage1: 1.0e-4, learning_rate_stage2: 1.0e-5}
    """
    wanted = {
        "base_model": "Qwen/Qwen2.5-0.5B-Instruct",
        "lora.alpha": 16,
        "lora.dropout": 0.1,
        "training.batch_size": 32,
        "training.max_steps": 125,
        "schedule.stage1_steps": 75,
        "schedule.learning_rate_stage1": 1e-4,
        "schedule.learning_rate_stage2": 1e-5,
        "trainer.accumulate_grad_batches": 8,
        "trainer.gradient_clip_val": 0.5,
        "trainer.precision": "bf16-mixed",
    }
    file = tmp_path / "c.yaml"
    for text in (traditional, flat):
        file.write_text(text, encoding="utf-8")
        found = values(yaml_facts(file))
        assert {k: float(v) if "rate" in k else v for k, v in found.items()} == wanted
    assert yaml_facts(file)["lora.alpha"].origin.startswith(f"{file}:3:16")


def test_what_no_run_of_ours_can_say_is_refused(tmp_path):
    file = tmp_path / "c.yaml"
    text = "training:\n  stage1_steps: 75\n  optimizer: sgd\n  warmup_steps: 10\n"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        yaml_facts(file)
    assert [line.partition(" has")[0] for line in error.value.problems] == [
        f"{file}:3:3: training.optimizer: sgd",
        f"{file}:4:3: training.warmup_steps: 10",
    ]


@pytest.mark.parametrize(
    "tree",
    [
        {"loss": {"alpha": 1}, "eval": {"batch_size": 3}, "max_steps": -1},
        {"service": {"model_name": "gpt-4", "lora_alpha": 99}},
    ],
)
def test_other_settings_are_not_taken_for_these(tree):
    assert facts_of(tree, "x") == {}
