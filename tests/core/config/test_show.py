"""Origins, commented defaults, JSON schema."""

import pytest
import yaml

from loragen.core.config import GenTrainConfig, LoraTrainConfig, load
from loragen.core.config.show import commented_defaults, json_schema, resolved_settings
from loragen.core.errors import ConfigError


@pytest.fixture
def origins(tmp_path, monkeypatch):
    """`origins(command, text)`: every setting's key -> (value, origin)."""
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


def test_a_replaced_value_is_no_origin(origins):
    found = origins(
        "gen",
        "schedule: {name: constant, learning_rate: 1}\nsources: [{run: a}, {run: b}]",
        settings=["schedule.name=cosine", "sources.1.run=c", "loggers={tensorboard: {}}"],
    )
    assert found["schedule.name"] == ("cosine", "--set")
    assert found["schedule.learning_rate"] == (1e-4, "default")
    assert found["sources"][1] == "c.yaml:2:1, --set"
    assert found["loggers.tensorboard.flush_secs"][1] == "default"


def test_an_invalid_configuration_is_an_error(origins):
    with pytest.raises(ConfigError, match="seed"):
        origins("lora", "seed: x")


def test_a_merged_key_has_the_position_where_it_was_written(origins):
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


@pytest.mark.parametrize("command, model", [("lora", LoraTrainConfig), ("gen", GenTrainConfig)])
def test_commented_defaults_load_to_the_defaults(configure, command, model):
    text = commented_defaults(command)
    assert configure(text, model=model) == load(model, environment={})
    assert yaml.safe_load(text)["training"]
    assert "  # Optimizer steps" in commented_defaults("lora")


class TestJsonSchema:
    @pytest.mark.parametrize("command, model", [("lora", LoraTrainConfig), ("gen", GenTrainConfig)])
    def test_it_has_every_section(self, command, model):
        schema = json_schema(command)
        assert set(schema["properties"]) == set(model.model_fields)
        assert schema["additionalProperties"] is False
        assert schema["$schema"].startswith("https://json-schema.org/")

    def test_the_objectives_are_offered_for_completion(self):
        objective = json_schema("gen")["$defs"]["GenTrainingSection"]["properties"]["objective"]
        assert {"auto", "transfer", "reconstruction-then-behaviour"} <= set(objective["examples"])

    def test_a_section_is_one_of_the_installed_plugins(self):
        schema = json_schema("lora")
        sections = [_resolved(schema, one) for one in schema["properties"]["schedule"]["anyOf"]]
        by_name = {section["properties"]["name"]["const"]: section for section in sections}
        assert {"constant", "cosine", "two-stage"} <= set(by_name)
        assert "stage1_steps" in by_name["two-stage"]["properties"]
        assert "name" not in by_name["two-stage"].get("required", [])  # it is the default
        assert by_name["cosine"]["required"] == ["name"]
        assert by_name["cosine"]["additionalProperties"] is False

    def test_the_loggers_have_their_options(self):
        schema = json_schema("gen")
        loggers = _resolved(schema, schema["properties"]["loggers"])
        options = _resolved(schema, loggers["properties"]["swanlab"]["anyOf"][0])
        assert "Project" in options["properties"]["project"]["description"]

    def test_a_plugin_that_does_not_load_is_left_out(self, install, caplog):
        sections = json_schema("lora")["properties"]["schedule"]["anyOf"]
        install(
            "their-plugin",
            "from loragen import hookimpl\n@hookimpl\ndef loragen_schedules():\n"
            "    return {'theirs': 'nowhere:Class'}\n",
        )
        assert json_schema("lora")["properties"]["schedule"]["anyOf"] == sections
        assert "schedule 'theirs'" in caplog.text


def _resolved(schema, part):
    """What a `$ref` stands for."""
    return schema["$defs"][part["$ref"].rpartition("/")[2]] if "$ref" in part else part
