"""A stranger's packages, installed by pip into an environment of their own beside loragen."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "loragen-example-plugin"

HOOK = """
from loragen import hookimpl

@hookimpl
def loragen_{kind}():
    return {{"theirs": "their_module:Theirs"}}
"""

LOAD = """
import json, sys
from pathlib import Path
from loragen.core.config import LoraTrainConfig, load
from loragen.core.plugins import create
schedule = load(LoraTrainConfig, Path(sys.argv[1]), environment={}).schedule
plugin = create("schedule", schedule.name, schedule.options)
print(json.dumps([schedule.model_dump(), plugin(10, 10).learning_rate]))
"""


class Environment:
    """A virtual environment that also sees the packages of the running one."""

    def __init__(self, path: Path) -> None:
        venv.create(path, with_pip=False)
        scheme = {"base": str(path), "platbase": str(path)}
        self.site = Path(sysconfig.get_path("purelib", "venv", scheme))
        self.python = Path(sysconfig.get_path("scripts", "venv", scheme)) / "python"
        ours = sysconfig.get_path("purelib")
        # addsitedir, not the bare path: loragen itself may be there as an editable install's .pth.
        line = f"import site; site.addsitedir({ours!r})\n"
        (self.site / "beside.pth").write_text(line, encoding="utf-8")

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(
            [self.python, *arguments], capture_output=True, text=True, check=False, cwd=self.site
        )
        assert result.returncode == 0 or not check, result.stdout + result.stderr
        return result

    def loragen(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "loragen", *arguments)

    def put(self, distribution: str, hooks: str) -> None:
        """A package as an installer would leave it: its module and its metadata."""
        module = distribution.replace("-", "_")
        info = self.site / f"{module}-1.0.dist-info"
        info.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n"
        (self.site / f"{module}.py").write_text(hooks, encoding="utf-8")
        (info / "METADATA").write_text(metadata, encoding="utf-8")
        (info / "entry_points.txt").write_text(f"[loragen]\nit = {module}\n", encoding="utf-8")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """With the example plugin installed, as its README says."""
    environment = Environment(tmp_path_factory.mktemp("beside") / "venv")
    source = tmp_path_factory.mktemp("source") / EXAMPLE.name
    copy_sources(EXAMPLE, source)  # a build leaves its traces beside the sources
    pip = [sys.executable, "-m", "pip", "--python", str(environment.python)]
    isolation = ["--no-build-isolation"] if has_setuptools() else []
    subprocess.run(
        [*pip, "install", "--quiet", "--no-deps", *isolation, str(source)],
        check=True,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    return environment


def copy_sources(origin: Path, target: Path) -> None:
    for path in origin.rglob("*"):
        if path.suffix in (".py", ".toml", ".md"):
            copy = target / path.relative_to(origin)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())


def has_setuptools() -> bool:
    try:
        import setuptools
    except ImportError:
        return False
    return int(setuptools.__version__.split(".")[0]) >= 77


def test_its_names_are_listed_with_its_package(environment):
    result = environment.loragen("plugins", "list", "--json")
    theirs = {
        (plugin["kind"], plugin["name"], plugin["version"])
        for plugin in json.loads(result.stdout)
        if plugin["distribution"] == "loragen-example-plugin"
    }
    assert theirs == {("schedule", "linear-decay", "0.1.0"), ("decoder", "mean-mlp", "0.1.0")}
    assert result.stderr == ""


def test_its_schedule_is_shown(environment):
    result = environment.loragen("plugins", "show", "schedule", "linear-decay")
    assert "loragen-example-plugin 0.1.0" in result.stdout
    assert "final_share" in result.stdout


def test_a_configuration_can_choose_it(environment, tmp_path):
    file = tmp_path / "theirs.yaml"
    file.write_text("schedule: {name: linear-decay, final_share: 0.5}\n", encoding="utf-8")
    section, last = json.loads(environment.run("-c", LOAD, str(file)).stdout)
    assert section == {"name": "linear-decay", "learning_rate": 1e-4, "final_share": 0.5}
    assert last == pytest.approx(5e-5)


def test_a_wrong_option_of_it_is_refused_with_its_place(environment, tmp_path):
    file = tmp_path / "theirs.yaml"
    file.write_text("schedule:\n  name: linear-decay\n  final_shar: 0.5\n", encoding="utf-8")
    result = environment.run("-c", LOAD, str(file), check=False)
    assert f"{file}:3:3: schedule.final_shar: unknown key. Did you mean 'final_share'?" in (
        result.stderr
    )


def test_its_own_tests_pass_beside_loragen(environment):
    tests = ["-m", "pytest", "-p", "no:cacheprovider", str(EXAMPLE / "tests")]
    assert "3 passed" in environment.run(*tests).stdout


def test_broken_packages_cost_one_warning_each(environment):
    """Last of the file: they stay in the environment."""
    environment.put("broken-import", "import no_such_module_anywhere")
    environment.put("misspelt-hook", HOOK.format(kind="shedules"))
    result = environment.loragen("plugins", "list")
    assert "linear-decay" in result.stdout
    assert "two-stage" in result.stdout
    first, second = sorted(result.stderr.splitlines())
    assert first.startswith("warning: plugin 'it' of broken-import 1.0")
    assert second.startswith("warning: plugin 'it' of misspelt-hook 1.0")
    assert "unknown hook 'loragen_shedules'" in second
    assert environment.loragen("--help").stderr == ""  # and help looks for no plugins at all
