import logging
import sys

import pytest

from loragen.core import plugins
from loragen.core.diagnosis import broken_promises
from loragen.core.errors import PluginError

HOOKS = """
from loragen import hookimpl

@hookimpl
def loragen_schedules():
    return {names!r}
"""

BUILT_IN = {
    "logger": ["csv", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"],
    "encoder": ["hashing", "sbert", "transformers"],
    "decoder": ["hyperconv", "mixture", "neighbours"],
    "schedule": ["constant", "cosine", "linear", "polynomial", "two-stage", "wsd"],
    "objective": ["behaviour", "reconstruction", "transfer"],
}


def schedules(**names):
    return HOOKS.format(names={name.replace("_", "-"): target for name, target in names.items()})


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize("kind", plugins.KINDS)
def test_built_in_names(kind):
    assert plugins.names(kind) == BUILT_IN[kind]


@pytest.mark.parametrize("kind, name", [(k, n) for k, names in BUILT_IN.items() for n in names])
def test_every_advertised_name_is_a_class_that_keeps_its_promises(kind, name):
    """A name is a string that no type checker follows to its class."""
    found = plugins.find(kind, name)
    assert isinstance(found, type)
    assert broken_promises(kind, found) == []


def test_describe_says_where_a_name_comes_from_without_importing_it(install):
    install("their-package", schedules(sawtooth="their_sawtooth:Sawtooth"), version="2.1")
    plugin = plugins.describe("schedule", "sawtooth")
    assert plugin.origin == "their-package 2.1"
    assert plugin.target == "their_sawtooth:Sawtooth"
    assert "their_sawtooth" not in sys.modules


def test_find_imports_only_the_chosen_class(install):
    install(
        "their-package",
        schedules(one="their_one:One", two="their_two:Two"),
        their_one="class One: ...",
        their_two="raise AssertionError('nobody chose this')",
    )
    assert plugins.find("schedule", "one").__name__ == "One"
    assert "their_one" in sys.modules
    assert "their_two" not in sys.modules


def test_create_validates_the_options_and_passes_on_what_the_protocol_adds(install):
    source = """
from pydantic import BaseModel

class Sawtooth:
    class Config(BaseModel, extra="forbid"):
        teeth: int = 3

    def __init__(self, config, *arguments):
        self.teeth, self.arguments = config.teeth, arguments
"""
    install("their-package", schedules(sawtooth="their_saw:Sawtooth"), their_saw=source)
    created = plugins.create("schedule", "sawtooth", {"teeth": "5"}, 384, "grid")
    assert (created.teeth, created.arguments) == (5, (384, "grid"))


def test_unknown_name_says_what_was_meant_and_what_exists():
    with pytest.raises(PluginError) as error:
        plugins.find("encoder", "sbrt")
    message = (
        "unknown encoder 'sbrt'. Did you mean 'sbert'? Installed: hashing, sbert, transformers"
    )
    assert error.value.problems == (message,)
    assert error.value.exit_code == 2


def test_unknown_name_far_from_all_lists_them_only():
    with pytest.raises(PluginError, match=r"'x'.*constant, co"):
        plugins.find("schedule", "x")


def test_unknown_kind():
    with pytest.raises(PluginError, match=r"'sched.*'schedule'"):
        plugins.find("schedul", "cosine")


def test_a_name_offered_twice_is_an_error_that_names_both_distributions(install):
    install("their-package", schedules(cosine="theirs:Cosine"), version="3.0")
    with pytest.raises(PluginError) as error:
        plugins.find("schedule", "cosine")
    message = str(error.value)
    assert "schedule 'cosine' is offered by" in message
    assert "loragen " in message
    assert "their-package 3.0 (theirs:Cosine)" in message
    assert plugins.find("schedule", "constant")  # the others are as usable as before


@pytest.mark.parametrize(
    "hooks, reason",
    [
        ("import no_such_module_anywhere", "ModuleNotFoundError: No module named 'no_such_mod"),
        ("raise RuntimeError('no licence')", "RuntimeError: no licence"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("def broken(:", "SyntaxError"),
        (schedules(saw="a:B").replace("schedules", "shedules"), "unknown hook 'loragen_shedules'"),
        (schedules(saw="a:B").replace("():", "(names):"), "names"),
        (schedules(saw="a:B").replace("return {", "return 5 #"), "TypeError: 'int' object"),
    ],
    ids=["missing", "raises", "exits", "syntax", "misspelt", "arguments", "not-a-mapping"],
)
def test_a_bad_plugin_costs_one_warning_and_nothing_else(install, caplog, hooks, reason):
    install("bad-package", hooks)
    install("good-package", schedules(good="their_good:Good"), their_good="class Good: ...")
    assert plugins.names("schedule") == sorted([*BUILT_IN["schedule"], "good"])
    plugins.names("encoder")
    (warning,) = warnings_of(caplog)
    assert "'it' of bad-package 1.0 (bad_package)" in warning
    assert reason in warning
    assert "\n" not in warning


def test_two_bad_plugins_are_told_apart(install, caplog):
    install("first-bad", "import no_such_module_anywhere")
    install("second-bad", schedules(saw="a:B").replace("schedules", "shedules"))
    assert plugins.find("schedule", "cosine")
    first, second = sorted(warnings_of(caplog))
    assert "first-bad" in first
    assert "second-bad" in second


@pytest.mark.parametrize(
    "target, reason",
    [
        ("no_such_module_anywhere:Saw", "ModuleNotFoundError"),
        ("their_module:Saw", "has no attribute 'Saw'"),
        ("their_module", "their_module"),
    ],
)
def test_a_name_whose_class_does_not_load_is_one_line(install, target, reason):
    install("their-package", schedules(saw=target), their_module="x = 1")
    with pytest.raises(PluginError) as error:
        plugins.find("schedule", "saw")
    (problem,) = error.value.problems
    assert "schedule 'saw' of their-package 1.0 does not load" in problem
    assert reason in problem
    assert "\n" not in problem


def test_a_distribution_seen_twice_counts_once(install, monkeypatch):
    """An editable install whose source tree is also on sys.path shows its metadata twice."""
    install("their-package", schedules(saw="their_saw:Saw"), their_saw="class Saw: ...")
    twice = list(plugins.entry_points(group="loragen")) * 2
    monkeypatch.setattr(plugins, "entry_points", lambda **_: twice)
    assert plugins.find("schedule", "saw").__name__ == "Saw"
