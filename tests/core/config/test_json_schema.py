import pytest

from loragen.core.config import GenTrainConfig, LoraTrainConfig
from loragen.core.config.show import json_schema


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
        assert len(sections) == 4
        assert "schedule 'theirs'" in caplog.text


def _resolved(schema, part):
    """What a `$ref` stands for."""
    return schema["$defs"][part["$ref"].rpartition("/")[2]] if "$ref" in part else part
