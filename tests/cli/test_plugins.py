import json

import pytest
from typer.testing import CliRunner

from loragen.cli.main import app

SAWTOOTH = """
from pydantic import BaseModel, Field

class Sawtooth:
    '''Up and down.'''

    class Config(BaseModel, extra="forbid"):
        height: float = Field(description="The top rate (per step).")
        teeth: int | None = Field(None, description="How many.")
"""

CALLABLE = """
    def __init__(self, config): ...

    def __call__(self, step, total_steps): ...
"""

HOOKS = """
from loragen import hookimpl

@hookimpl
def loragen_schedules():
    return {"sawtooth": "their_saw:Sawtooth"}
"""


def loragen(*arguments):
    return CliRunner().invoke(app, ["plugins", *arguments])


def test_list_names_every_plugin_with_its_package():
    result = loragen("list")
    assert result.exit_code == 0
    assert result.stderr == ""
    header, *rows = result.stdout.splitlines()
    assert header.split() == ["kind", "name", "package", "version", "class"]
    pairs = [tuple(row.split()[:3]) for row in rows]
    assert ("schedule", "two-stage", "loragen") in pairs
    assert ("encoder", "sbert", "loragen") in pairs
    assert pairs == sorted(pairs)


def test_list_as_json():
    result = loragen("list", "--json")
    found = {(plugin["kind"], plugin["name"]): plugin for plugin in json.loads(result.stdout)}
    assert found["logger", "swanlab"]["target"] == "loragen.plugins.loggers.swanlab:SwanLab"
    assert set(found["logger", "swanlab"]) == {
        "kind", "name", "target", "distribution", "version",
    }  # fmt: skip


def test_show_prints_origin_meaning_and_options(install):
    site = install("their-package", HOOKS, version="2.1", their_saw=SAWTOOTH)
    result = loragen("show", "schedule", "sawtooth")
    assert result.exit_code == 0
    for part in (
        "their-package 2.1",
        "their_saw:Sawtooth",
        str(site / "their_saw.py"),
        "loragen lora train --dataset FILE --set schedule.name=sawtooth",
        "Up and down.",
        "height",
        "required",
        "The top rate (per step).",
        "int | None",
        "How many.",
    ):
        assert part in result.stdout


def test_show_as_json(install):
    install("their-package", HOOKS, their_saw=SAWTOOTH)
    shown = json.loads(loragen("show", "schedule", "sawtooth", "--json").stdout)
    assert shown["distribution"] == "their-package"
    assert shown["description"] == "Up and down."
    assert shown["options"] == {
        "height": {
            "type": "float",
            "default": None,
            "required": True,
            "description": "The top rate (per step).",
        },
        "teeth": {
            "type": "int | None",
            "default": None,
            "required": False,
            "description": "How many.",
        },
    }


@pytest.mark.parametrize("name", ["constant", "cosine", "two-stage"])
def test_show_every_built_in_schedule(name):
    result = loragen("show", "schedule", name)
    assert result.exit_code == 0
    assert f"schedule {name}" in result.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("schedule", "cosin"), "unknown schedule 'cosin'."),
        (("shedule", "cosine"), "unknown kind of plugin 'shedule'."),
    ],
)
@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_an_unknown_name_is_one_line_and_exit_code_2(arguments, message, flags):
    result = loragen("show", *arguments, *flags)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {message}")


def test_a_plugin_that_does_not_import_is_one_line(install):
    install("their-package", HOOKS, their_saw="import no_such_module_anywhere")
    assert "sawtooth" in loragen("list").stdout
    result = loragen("show", "schedule", "sawtooth")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert "their-package 1.0" in line


def test_a_bad_package_costs_one_warning_line(install):
    install("bad-package", "import no_such_module_anywhere")
    result = loragen("list")
    assert result.exit_code == 0
    assert "two-stage" in result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith("warning: ")
    assert "bad-package 1.0" in line


def test_new_writes_a_package_and_says_what_is_next(tmp_path):
    result = loragen("new", "saw", "--kind", "decoder", "-o", str(tmp_path / "a package"))
    assert result.exit_code == 0
    assert result.stdout == f"{tmp_path / 'a package'}\n"
    head, *commands = [line.strip() for line in result.stderr.splitlines()]
    assert head == "next:"
    assert commands[0] == f"cd '{tmp_path / 'a package'}'"
    assert commands[-1].endswith("--set decoder.name=saw")
    assert (tmp_path / "a package" / "src" / "loragen_saw" / "decoder.py").is_file()


def test_new_as_json(tmp_path):
    result = loragen("new", "saw", "--kind", "logger", "-o", str(tmp_path / "new"), "--json")
    document = json.loads(result.stdout)
    assert document["directory"] == str(tmp_path / "new")
    assert all((tmp_path / "new" / file).is_file() for file in document["files"])
    assert 'pip install -e ".[dev]"' in document["next"]


@pytest.mark.parametrize("arguments", [("Saw", "--kind", "schedule"), ("saw", "--kind", "sched")])
def test_new_refuses_in_one_line(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = loragen("new", *arguments)
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_doctor_says_what_is_wrong_and_fails(install, only_theirs):
    install("bad-package", "import no_such_module_anywhere")
    install("their-package", HOOKS, their_saw=SAWTOOTH + CALLABLE.replace("__call__", "rate"))
    result = loragen("doctor")
    assert result.exit_code == 1
    first, second = result.stdout.splitlines()
    assert first.startswith("plugin 'it' of bad-package 1.0 (bad_package): ModuleNotFoundError")
    assert second.startswith("schedule 'sawtooth' of their-package 1.0: their_saw:Sawtooth: ")
    assert result.stderr == "error: 2 faults of plugins\n"
    document = json.loads(loragen("doctor", "--json").stdout)
    assert document["plugins"] == 1
    assert [one["subject"] for one in document["faults"]] == [
        "plugin 'it' of bad-package 1.0 (bad_package)",
        "schedule 'sawtooth' of their-package 1.0",
    ]


def test_the_doctor_is_content(install, only_theirs):
    install("their-package", HOOKS, their_saw=SAWTOOTH + CALLABLE)
    result = loragen("doctor")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "1 plugin: nothing is wrong with them\n"
