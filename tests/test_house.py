"""The rules of the house: light modules, layers, one version, metadata that is up to date."""

import ast
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from graphlib import TopologicalSorter
from importlib.metadata import distribution, version
from pathlib import Path

import pytest

import loragen
from loragen.core.plugins import KINDS
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
    ["library", "add", "--help"],
    ["serve", "--help"],
    ["runs", "list", "--json"],
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
    modules = (
        "loragen",
        "loragen.testing",
        "loragen.core.plugins",
        "loragen.demo.world",
        "loragen.demo.workers",
    )
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


def trees():
    """Module name -> its syntax tree, of every module of the package."""
    files = sorted((ROOT / "loragen").rglob("*.py"))
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    return {
        name.removesuffix(".__init__"): ast.parse(file.read_text(encoding="utf-8"))
        for name, file in zip(names, files, strict=True)
    }


def test_no_two_files_import_each_other():
    """Imports inside functions and for type checkers count, too."""
    modules = trees()
    imported = defaultdict(set)
    for name, tree in modules.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    imported[name].add(full if full in modules else node.module)
            elif isinstance(node, ast.Import):
                imported[name] |= {alias.name for alias in node.names}
    # `loragen` itself looks `Generator` up when asked for; every plugin imports `loragen`.
    del imported["loragen"]
    TopologicalSorter(imported).prepare()  # raises CycleError naming the files of a circle


def test_no_public_name_is_defined_twice():
    """Hooks have the names of their specifications, wherever they are implemented."""
    defined = defaultdict(list)
    for module, tree in trees().items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                defined[node.name].append(module)
    hooks = {"loragen_" + kind + "s" for kind in KINDS}
    twice = {name: where for name, where in defined.items() if len(where) > 1 and name not in hooks}
    assert twice == {}


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
