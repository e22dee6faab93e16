"""What `loragen plugins new` writes is a package that works, and pip installs it beside loragen."""

import importlib.util
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from loragen.core import plugins
from loragen.core.diagnosis import broken_promises
from loragen.core.errors import UsageError
from loragen.scaffold import Scaffold
from tests.environments import Environment
from tests.processes import run_in_turn

ROOT = Path(__file__).parent.parent
NAME = "linear-decay"

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


class AuthorsEnvironment(Environment):
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
def package(tmp_path_factory):
    """The package of a schedule, as the command writes it."""
    work = tmp_path_factory.mktemp("work")
    new = ["plugins", "new", NAME, "--kind", "schedule"]
    ((_, (code, out, err, _)),) = run_in_turn([new], cwd=work)
    assert (code, out) == (0, "loragen-linear-decay\n")
    assert err.startswith("next:\n  cd loragen-linear-decay\n  pip install -e ")
    return work / "loragen-linear-decay"


@pytest.fixture(scope="module")
def environment(package, tmp_path_factory):
    """With the package installed, as its README says."""
    environment = AuthorsEnvironment(tmp_path_factory.mktemp("beside") / "venv")
    isolation = ["--no-build-isolation"] if has_setuptools() else []
    environment.install(*isolation, str(package))
    return environment


def has_setuptools() -> bool:
    try:
        import setuptools
    except ImportError:
        return False
    return int(setuptools.__version__.split(".")[0]) >= 77


def test_the_steps_of_its_workflow_pass(package, environment):
    """mypy is run for all kinds at once, below: it takes as long for one."""
    workflow = yaml.safe_load((package / ".github/workflows/tests.yml").read_text(encoding="utf-8"))
    steps = [step["run"] for step in workflow["jobs"]["tests"]["steps"] if "run" in step]
    assert steps == [
        'pip install -e ".[dev]"',
        "ruff check .",
        "ruff format --check .",
        "mypy",
        "pytest",
        f"loragen plugins show schedule {NAME}",
    ]
    for step in steps[1:3]:
        subprocess.run([sys.executable, "-m", *step.split()], cwd=package, check=True)
    found = environment.run("-m", "pytest", "-p", "no:cacheprovider", str(package)).stdout
    assert "2 passed" in found
    shown = environment.loragen(*steps[-1].split()[1:]).stdout
    assert "loragen-linear-decay 0.1.0" in shown
    assert str(environment.site / "loragen_linear_decay" / "schedule.py") in shown
    assert "final_share" in shown


def test_its_name_is_listed_with_its_package(environment):
    result = environment.loragen("plugins", "list", "--json")
    theirs = [
        (plugin["kind"], plugin["name"], plugin["version"])
        for plugin in json.loads(result.stdout)
        if plugin["distribution"] == "loragen-linear-decay"
    ]
    assert theirs == [("schedule", NAME, "0.1.0")]
    assert result.stderr == ""


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


# ---- every kind


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """{kind: the directory of its package}"""
    work = tmp_path_factory.mktemp("packages")
    for kind in plugins.KINDS:
        Scaffold(f"my-{kind}", kind).write(work / kind)
    return {kind: work / kind for kind in plugins.KINDS}


@pytest.mark.parametrize("kind", plugins.KINDS)
def test_the_tests_of_every_kind_pass(packages, kind, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(packages[kind] / "src")
    file = packages[kind] / "tests" / f"test_{kind}.py"
    spec = importlib.util.spec_from_file_location(f"their_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tests = [value for name, value in vars(module).items() if name.startswith("test_")]
    assert tests
    for number, test in enumerate(tests):
        own = tmp_path / str(number)
        own.mkdir()
        test(**({"tmp_path": own} if inspect.signature(test).parameters else {}))
    hooks = importlib.import_module(f"loragen_my_{kind}")
    table = getattr(hooks, f"loragen_{kind}s")()
    ((name, target),) = table.items()
    assert name == f"my-{kind}"
    cls = getattr(importlib.import_module(target.partition(":")[0]), target.partition(":")[2])
    assert broken_promises(kind, cls) == []


def test_ruff_and_mypy_have_nothing_to_say_about_any_kind(packages):
    work = packages["schedule"].parent
    for arguments in (["check", "."], ["format", "--check", "."]):
        subprocess.run([sys.executable, "-m", "ruff", *arguments], cwd=work, check=True)
    sources = [str(file) for file in work.rglob("*.py")]
    assert len(sources) == 3 * len(packages)
    # Its cache has all that they import if `make check` has filled it; else this takes a minute.
    strict = ["--config-file", "pyproject.toml", *sources]
    result = subprocess.run(
        [sys.executable, "-m", "mypy", *strict], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("name", "class_name"),
    [
        ("sawtooth", "Sawtooth"),
        ("two-words2", "TwoWords2"),
        ("rate", "RateSchedule"),  # the template imports Rate
        ("none", "NoneSchedule"),
        ("loragen-saw", "LoragenSaw"),
    ],
)
def test_a_name_makes_a_class(name, class_name):
    scaffold = Scaffold(name, "schedule")
    assert scaffold.class_name == class_name
    assert scaffold.package.count("loragen") == 1
    for place, text in scaffold.documents.items():
        if place.endswith(".py"):
            compile(text, place, "exec")


@pytest.mark.parametrize(
    ("name", "kind", "problem"),
    [
        ("Saw", "schedule", "cannot be the name"),
        ("saw_tooth", "schedule", "cannot be the name"),
        ("1st", "schedule", "cannot be the name"),
        ("saw--tooth", "schedule", "cannot be the name"),
        ("", "schedule", "cannot be the name"),
        ("../saw", "schedule", "cannot be the name"),
        ("cosine", "schedule", "installed already, by loragen"),
        ("saw", "shedule", "Did you mean 'schedule'"),
    ],
)
def test_what_cannot_be_a_plugin_is_refused(name, kind, problem):
    with pytest.raises(UsageError, match=problem):
        Scaffold(name, kind)


def test_nothing_is_written_where_something_is(tmp_path):
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    scaffold = Scaffold("sawtooth", "schedule")
    with pytest.raises(UsageError, match="is not empty"):
        scaffold.write(tmp_path)
    with pytest.raises(UsageError, match="is a file"):
        scaffold.write(tmp_path / "mine.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    scaffold.write(tmp_path / "new")
    with pytest.raises(UsageError, match="is not empty"):
        scaffold.write(tmp_path / "new")
