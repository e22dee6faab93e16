"""One broken plugin of each kind of fault, each explained in one line."""

import pytest

from loragen.core.diagnosis import broken_promises, diagnose

HOOKS = """
from loragen import hookimpl

@hookimpl
def loragen_schedules():
    return {names!r}
"""
CONFIG = """
    class Config(BaseModel, extra="forbid"):
        pass
"""
SAW = f"""
from pydantic import BaseModel

class Saw:{CONFIG}
    def __init__(self, config): ...

    def __call__(self, step, total_steps): ...
"""
TWO = HOOKS.format(names={"saw": "their_saw:Saw"})


@pytest.fixture
def faults(install, only_theirs):
    """`faults(hooks, their_saw=source)`: what the doctor says of `theirs`, as (subject, reason)."""

    def found(hooks, **modules):
        install("theirs", hooks, **modules)
        lines = [(one.subject, one.reason) for one in diagnose()[1]]
        assert not any("\n" in part for line in lines for part in line)
        return lines

    return found


def test_nothing_is_wrong_with_a_sound_plugin(faults):
    assert faults(TWO, their_saw=SAW) == []


@pytest.mark.parametrize(
    ("hooks", "reason"),
    [
        ("import no_such_module_anywhere", "ModuleNotFoundError: No module named 'no_such_module"),
        ("raise RuntimeError('no licence')", "RuntimeError: no licence"),
        ("x = 1", "it has no hook; hooks: loragen_loggers, loragen_encoders"),
        ("def loragen_schedules(): return {}", "loragen_schedules without @hookimpl is no hook"),
        (TWO.replace("schedules", "shedules"), "'loragen_shedules'"),
        (TWO.replace("schedules", "shedules"), "Did you mean 'loragen_schedules'?"),
        (TWO.replace("return {", "return 5 #"), "TypeError: 'int' object is not iterable"),
    ],
)
def test_an_entry_point_without_plugins_is_explained(faults, hooks, reason):
    ((subject, said),) = faults(hooks, their_saw=SAW)
    assert subject == "plugin 'it' of theirs 1.0 (theirs)"
    assert reason in said


def test_an_entry_point_to_nothing_is_explained(install, only_theirs):
    site = install("theirs", TWO)
    (site / "theirs.py").unlink()
    ((fault),) = diagnose()[1]
    assert fault.subject == "plugin 'it' of theirs 1.0 (theirs)"
    assert fault.reason == "ModuleNotFoundError: No module named 'theirs'"


@pytest.mark.parametrize(
    ("target", "source", "reason"),
    [
        ("their_saw:Saw", "import no_such_module_anywhere", "their_saw:Saw: ModuleNotFoundError"),
        ("their_saw:Sow", SAW, "module 'their_saw' has no attribute 'Sow'"),
        ("their_saw", SAW, "their_saw: ValueError: expected 'module:Class'"),
        ("their_saw:Saw", "Saw = 3", "their_saw:Saw: is 3, not a class"),
        ("their_saw:Saw", SAW.replace("Config", "Options"), "has no nested Config"),
        ("their_saw:Saw", SAW.replace("(BaseModel, ex", "(dict, ex"), "TypeError"),
        ("their_saw:Saw", SAW.replace(', extra="forbid"', ""), 'declare it with extra="forbid"'),
        ("their_saw:Saw", SAW.replace("__call__", "rate"), "lacks __call__ of the protocol Sched"),
        (
            "their_saw:Saw",
            SAW.replace("(self, config)", "(self)"),
            "cannot be constructed from (config): too many positional arguments",
        ),
    ],
)
def test_a_class_that_breaks_its_promises_is_explained(faults, target, source, reason):
    ((subject, said),) = faults(HOOKS.format(names={"saw": target}), their_saw=source)
    assert subject == "schedule 'saw' of theirs 1.0"
    assert reason in said


def test_a_clash_is_said_of_both_with_both(install, faults):
    install("others", TWO, version="2.0")
    first, second = faults(TWO, their_saw=SAW)
    assert first == (
        "schedule 'saw' of others 2.0",
        "offered by theirs 1.0 (their_saw:Saw), too: uninstall one of them",
    )
    assert second[0] == "schedule 'saw' of theirs 1.0"
    assert "others 2.0 (their_saw:Saw)" in second[1]


def of_class(kind, body, base="nn.Module"):
    """What a class with this body lacks of its protocol."""
    space = {"__name__": "theirs"}
    prefix = "from torch import nn\nfrom pydantic import BaseModel\nfrom loragen.core.protocols"
    exec(f"{prefix} import Objective\nclass Theirs({base}):{CONFIG}{body}", space)
    return broken_promises(kind, space["Theirs"])


def test_methods_of_a_module_are_its_own():
    decoder = "    def __init__(self, config, condition_dim, grid): ..."
    assert of_class("decoder", decoder) == ["lacks forward of the protocol Decoder"]
    assert of_class("decoder", f"{decoder}\n    def forward(self, condition, mask): ...") == []
    assert of_class("decoder", decoder, "object") == ["is no torch.nn.Module"]


def test_an_attribute_may_be_set_by_the_constructor(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    source = f"""
from torch import nn
from pydantic import BaseModel

class Theirs(nn.Module):{CONFIG}
    frozen = None

    def __init__(self, config):
        self.dim = 3

    def forward(self, texts): ...
"""
    (tmp_path / "their_attributes.py").write_text(source, encoding="utf-8")
    from their_attributes import Theirs

    assert broken_promises("encoder", Theirs) == ["lacks fingerprint of the protocol Encoder"]


def test_what_an_objective_inherits_is_not_its_own():
    start = "    def __init__(self, options, data): ..."
    missing = of_class("objective", start, "Objective")
    assert missing == ["lacks batches, loss, validate of the protocol Objective"]
