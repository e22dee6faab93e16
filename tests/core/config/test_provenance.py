import pytest

from loragen.core.config import GenTrainConfig, LoraTrainConfig, document
from loragen.core.config.json_schema import json_schema
from loragen.core.config.provenance import command_for, settings_of
from loragen.core.errors import ConfigError


@pytest.fixture
def origins(tmp_path, monkeypatch):
    """`origins(command, text)`: each setting's key, with where it came from."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "c.yaml"

    def read(command, text="", environment=None, **layers):
        file.write_text(text, encoding="utf-8")
        found = settings_of(
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


def test_an_old_files_values_are_where_they_were(origins):
    found = origins("lora", "training:\n  stage1: {steps: 75}\n")
    assert found["schedule.stage1_steps"] == (75, "c.yaml:2:12 (training.stage1.steps)")


def test_what_does_not_validate_is_not_shown(origins):
    with pytest.raises(ConfigError, match="seed"):
        origins("lora", "seed: x")


@pytest.mark.parametrize(
    "text, command",
    [
        ("decoder: {blocks: 1}", "gen"),
        ("schedule: {name: two-stage}\nbase_model: a", "lora"),
        ("training: {mse_weight: 1, max_steps: 3}", "gen"),
        ("training: {patience: 1}\nbogus: 1", "lora"),
        ("model: {hidden_dim: 3}", "gen"),
        ("training: {stage1_steps: 3}", "lora"),
        ("seed: 3", "lora"),
        ("", "lora"),
    ],
)
def test_the_keys_tell_whose_a_file_is(tmp_path, text, command):
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    assert command_for(tmp_path / "c.yaml") == command


@pytest.mark.parametrize("command", ["lora", "gen"])
def test_a_document_is_its_own_commands(tmp_path, command):
    (tmp_path / "c.yaml").write_text(document(command), encoding="utf-8")
    assert command_for(tmp_path / "c.yaml") == command


class TestJsonSchema:
    @pytest.mark.parametrize("command, model", [("lora", LoraTrainConfig), ("gen", GenTrainConfig)])
    def test_it_has_every_section(self, command, model):
        schema = json_schema(command)
        assert set(schema["properties"]) == set(model.model_fields)
        assert schema["additionalProperties"] is False
        assert schema["$schema"].startswith("https://json-schema.org/")

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
        install(
            "their-plugin",
            "from loragen import hookimpl\n@hookimpl\ndef loragen_schedules():\n"
            "    return {'theirs': 'nowhere:Class'}\n",
        )
        sections = json_schema("lora")["properties"]["schedule"]["anyOf"]
        assert len(sections) == 3
        assert "schedule 'theirs'" in caplog.text


def _resolved(schema, part):
    """What a `$ref` stands for."""
    return schema["$defs"][part["$ref"].rpartition("/")[2]] if "$ref" in part else part
