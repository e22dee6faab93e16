"""The rules of the house: light modules, layers, one version, metadata that is up to date."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import distribution, version
from pathlib import Path

import pytest

import loragen
from tests.processes import HEAVY, run_in_turn

ROOT = Path(__file__).parent.parent
COMMANDS = [
    ["--help"],
    ["--version"],
    ["lora", "train", "--help"],
    ["lora", "export", "--help"],
    ["ckpt", "convert", "--help"],
    ["gen", "train", "--help"],
    ["gen", "eval", "--help"],
    ["plugins", "list"],
    ["plugins", "show", "schedule", "cosine"],
    ["plugins", "show", "logger", "swanlab"],
]


def test_the_command_line_is_light():
    """`--help` answers at once: nothing heavy is imported before a command needs it."""
    for command, (code, out, err, heavy) in run_in_turn(COMMANDS):
        assert (code, err, heavy) == (0, "", []), command
        assert out, command


def test_what_an_author_imports_and_a_demo_begins_with_is_light():
    modules = ("loragen", "loragen.testing", "loragen.core.plugins", "loragen.demo.data")
    code = f"import sys, {', '.join(modules)}; print([n for n in {HEAVY!r} if n in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"


def test_the_layers_hold():
    tool = Path(sys.executable).with_name("lint-imports")
    if not tool.exists():
        pytest.skip("import-linter is not installed")
    result = subprocess.run(
        [tool, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_installed_entry_points_are_those_of_pyproject():
    """They are read from the metadata of the last install: `pip install -e .` after a change."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    points = distribution("loragen").entry_points
    installed = {point.name: point.value for point in points if point.group == "loragen"}
    assert installed == project["entry-points"]["loragen"]


def test_there_is_one_version():
    assert version("loragen") == loragen.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", loragen.__version__)


def test_what_loragen_offers_at_the_top():
    assert set(loragen.__all__) == {"Generator", "LoragenError", "__version__", "hookimpl"}
    assert set(loragen.__all__) <= set(dir(loragen))
    assert loragen.Generator.__module__ == "loragen.core.generator.model"
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = loragen.Nothing
