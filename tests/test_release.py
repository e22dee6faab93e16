"""What `python -m build` gives holds all that is needed and nothing else, and works where there is
no repository."""

import json
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml

import loragen
from tests.conftest import ANIMALS, COLORS, TINY_LORA, rows_of, write_lines
from tests.environments import Environment
from tests.processes import run_in_turn

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(the sdist, the wheel made from it)"""
    folder = tmp_path_factory.mktemp("dist")
    result = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    names = [f"loragen-{loragen.__version__}{end}" for end in ("-py3-none-any.whl", ".tar.gz")]
    assert sorted(file.name for file in folder.iterdir()) == names
    return folder / names[1], folder / names[0]


@pytest.fixture(scope="module")
def environment(built, tmp_path_factory):
    environment = Environment(tmp_path_factory.mktemp("fresh") / "venv")
    environment.install("--no-index", str(built[1]))
    return environment


def repository(*more):
    """The paths that git tracks; skips where there is no git repository."""
    command = ["git", "-C", ROOT, "ls-files", "-z", *more]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        pytest.skip("not a git repository")
    return {path for path in result.stdout.split("\0") if path and (ROOT / path).is_file()}


def test_the_sdist_is_the_repository_without_what_only_its_checkout_needs(built):
    with tarfile.open(built[0]) as archive:
        members = archive.getmembers()
    assert all(member.isfile() for member in members)
    found = {member.name.partition("/")[2] for member in members}
    assert repository() - found == {".pre-commit-config.yaml"}
    new = repository("--others", "--exclude-standard")
    assert found - repository() - new == {"PKG-INFO"}


def test_the_wheel_is_the_package_and_its_licence(built):
    with zipfile.ZipFile(built[1]) as archive:
        found = set(archive.namelist())
        metadata = Parser().parsestr(archive.read(info("METADATA")).decode())
    everything = repository() | repository("--others", "--exclude-standard")
    package = {path for path in everything if path.startswith("loragen/")}
    assert {"loragen/py.typed", "loragen/core/page.html"} < package
    files = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
    assert found == package | {info(file) for file in files}
    assert metadata["License-Expression"] == "MIT"
    urls = dict(line.split(", ", 1) for line in metadata.get_all("Project-URL"))
    assert urls == PROJECT["urls"]
    readme = metadata.get_payload()
    links = re.findall(r"\]\(([^)]+)\)", readme)
    at = f"{urls['Repository']}/(?:blob|raw)/v{re.escape(loragen.__version__)}/"
    inside = {re.sub(at, "", link).partition("#")[0] for link in links if re.match(at, link)}
    assert {"docs/real-tasks.png", "docs/cli/index.md", "README.zh-CN.md"} < inside <= everything
    assert all(link.startswith("https://") for link in links), "a link that PyPI cannot follow"


def answers(environment, directory, *commands):
    """What they print, of the installed wheel, in `directory`."""
    found = run_in_turn(commands, cwd=directory, python=environment.python)
    for command, (code, out, err, _) in found:
        assert code == 0, (command, out, err)
    return [out for _, (_, out, _, _) in found]


def info(file):
    return f"loragen-{loragen.__version__}.dist-info/{file}"


@pytest.mark.timeout(600)  # two processes that import all; seconds on a quiet machine
def test_the_wheel_works_in_an_empty_directory(environment, tmp_path):
    """From labelled rows to a generated adapter, and the package of a plugin; its base model and
    all texts come with the wheel."""
    for name, words in (("one", COLORS), ("two", ANIMALS)):
        write_lines(tmp_path / f"{name}.jsonl", rows_of(words))
    settings = [part for key in TINY_LORA for part in ("--set", f"{key}={TINY_LORA[key]}")]
    data = ["--dataset", "one.jsonl", "--dataset", "two.jsonl", "--base-model", "demo"]
    quick = {"training.objective": "reconstruction", "encoder.name": "hashing", "loggers": "{}"}
    learn = [part for key in quick for part in ("--set", f"{key}={quick[key]}")]
    outputs = answers(
        environment,
        tmp_path,
        ["--version"],
        ["demo", "--help"],
        ["plugins", "list", "--json"],
        ["plugins", "new", "sawtooth", "--kind", "schedule"],
        ["lora", "train", *data, *settings],
        ["gen", "train", "--checkpoint-dir", "runs", "--test-mode", *learn],
    )
    assert outputs[0] == f"loragen {loragen.__version__}\n"
    listed = json.loads(outputs[2])
    assert {"two-stage", "hashing", "mixture"} <= {plugin["name"] for plugin in listed}
    assert (tmp_path / "loragen-sawtooth" / "pyproject.toml").is_file()
    (generator,) = (tmp_path / "experiments").iterdir()
    outputs = answers(
        environment,
        tmp_path,
        ["gen", "infer", "--model", generator, "--prompt-file", "one.jsonl", "--output", "a"],
        ["ckpt", "analyze", "a", "--html", "a.html"],
        ["lora", "eval", "--adapter", "a", "--dataset", "one.jsonl", "--json"],
    )
    assert (tmp_path / "a" / "adapter_model.safetensors").is_file()
    assert "</html>" in (tmp_path / "a.html").read_text(encoding="utf-8")
    assert json.loads(outputs[2])["rows"] == 12
    where = environment.run("-c", "import loragen; print(loragen.__file__)").stdout.strip()
    assert where == str(environment.site / "loragen" / "__init__.py")
    script = [environment.scripts / "loragen", "--help"]
    shown = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "Prompts in, LoRA adapters out." in shown.stdout


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_a_workflow_pins_what_it_uses_and_may_do_little(file):
    text = file.read_text(encoding="utf-8")
    used = re.findall(r"uses: (\S+?)@(\S+)( # v[\d.]+)?$", text, re.MULTILINE)
    assert len(used) == text.count("uses: ")
    for action, version, comment in used:
        if action.startswith("actions/"):
            assert re.fullmatch(r"v\d+\.\d+\.\d+", version), action
        else:  # of others: the commit itself
            assert re.fullmatch(r"[0-9a-f]{40}", version), action
            assert comment, action
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    rights = {name: job.get("permissions") for name, job in workflow["jobs"].items()}
    tokens = {name: right for name, right in rights.items() if right}
    assert tokens == ({"publish": {"id-token": "write"}} if file.stem == "publish" else {})


def test_the_workflow_tries_every_python_that_is_promised():
    (file,) = [file for file in WORKFLOWS if file.stem == "tests"]
    jobs = yaml.safe_load(file.read_text(encoding="utf-8"))["jobs"]
    promised = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if ":: 3." in line]
    assert jobs["tests"]["strategy"]["matrix"]["python"] == promised
    assert any(job["runs-on"].startswith("windows") for job in jobs.values())
