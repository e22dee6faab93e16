import pytest

from loragen.core.config.load import guess_command
from loragen.core.config.show import commented_defaults
from loragen.legacy.translate import old_command_of


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
    file = tmp_path / "c.yaml"
    assert (old_command_of(file) or guess_command(file)) == command


@pytest.mark.parametrize("command", ["lora", "gen"])
def test_a_document_is_its_own_commands(tmp_path, command):
    (tmp_path / "c.yaml").write_text(commented_defaults(command), encoding="utf-8")
    file = tmp_path / "c.yaml"
    assert old_command_of(file) is None
    assert guess_command(file) == command
