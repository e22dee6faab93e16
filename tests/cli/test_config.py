import pytest
import yaml

from loragen.core.config import GenTrainConfig, LoraTrainConfig, load


@pytest.mark.parametrize("command, model", [("lora", LoraTrainConfig), ("gen", GenTrainConfig)])
def test_init_writes_the_defaults_as_a_file_that_loads(loragen, command, model):
    result = loragen("config", "init", command)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert yaml.safe_load(result.stdout)["seed"] == 42
    (loragen.work / "c.yaml").write_text(result.stdout, encoding="utf-8")
    written = load(model, loragen.work / "c.yaml", environment={})
    assert written == load(model, environment={})


def test_every_line_of_a_plugin_is_explained(loragen):
    text = loragen("config", "init", "gen").stdout
    (line,) = [line for line in text.splitlines() if line.strip().startswith("kernel_size:")]
    assert line.endswith("# Kernel of ConvH (in layers) and ConvL (in tokens).")


def test_an_unknown_command_is_a_usage_error(loragen):
    result = loragen("config", "init", "loar")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "loar" in result.stderr
