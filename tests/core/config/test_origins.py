import pytest

from loragen.core.config.show import resolved_settings
from loragen.core.errors import ConfigError


@pytest.fixture
def origins(tmp_path, monkeypatch):
    """`origins(command, text)`: each setting's key, with where it came from."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "c.yaml"

    def read(command, text="", environment=None, **layers):
        file.write_text(text, encoding="utf-8")
        found = resolved_settings(
            command, file.relative_to(tmp_path), environment=environment or {}, **layers
        )
        return {setting.key: (setting.value, setting.origin) for setting in found}

    return read


def test_every_layer_is_named(origins):
    found = origins(
        "lora",
        "training: {batch_size: 4, max_steps: 5, val_every: 6}\nschedule:\n  stage1_steps: 2\n",
        {"LORAGEN_TRAINING__MAX_STEPS": "7"},
        settings=["training.val_every=8", "loggers.swanlab.mode=disabled"],
    )
    assert found["training.batch_size"] == (4, "c.yaml:1:12")
    assert found["training.max_steps"] == (7, "LORAGEN_TRAINING__MAX_STEPS")
    assert found["training.val_every"] == (8, "--set")
    assert found["schedule.stage1_steps"] == (2, "c.yaml:3:3")
    assert found["schedule.name"] == ("two-stage", "default")
    assert found["schedule.learning_rate_stage1"] == (1e-4, "default")
    assert found["loggers.swanlab.mode"] == ("disabled", "--set")
    assert found["loggers.tensorboard.flush_secs"] == (10, "default")
    assert found["seed"] == (42, "default")


def test_what_an_override_has_replaced_is_not_where_a_value_came_from(origins):
    found = origins(
        "gen",
        "schedule: {name: constant, learning_rate: 1}\nsources: [{run: a}, {run: b}]",
        settings=["schedule.name=cosine", "sources.1.run=c", "loggers={tensorboard: {}}"],
    )
    assert found["schedule.name"] == ("cosine", "--set")
    assert found["schedule.learning_rate"] == (1e-4, "default")
    assert found["sources"][1] == "c.yaml:2:1, --set"
    assert found["loggers.tensorboard.flush_secs"][1] == "default"


def test_what_does_not_validate_is_not_shown(origins):
    with pytest.raises(ConfigError, match="seed"):
        origins("lora", "seed: x")


def test_what_yaml_merges_in_is_where_it_was_written(origins):
    found = origins(
        "lora",
        "training:\n  <<: [{batch_size: 4, max_steps: 5}, {batch_size: 6, val_every: 7}]\n"
        "  max_steps: 8\n"
        "<<: {seed: 3, lora: {rank: 2}}\n"
        "lora: &lora {alpha: 9, <<: *lora}\n",
    )
    assert found["training.batch_size"] == (4, "c.yaml:2:9")
    assert found["training.max_steps"] == (8, "c.yaml:3:3")
    assert found["training.val_every"] == (7, "c.yaml:2:55")
    assert found["seed"] == (3, "c.yaml:4:6")
    assert found["lora.alpha"] == (9, "c.yaml:5:14")
    assert found["lora.rank"] == (8, "default")
