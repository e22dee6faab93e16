"""What is wrong with the installed plugins: `loragen plugins doctor`.

Every class is imported and compared with the protocol of its kind; none is constructed, since that
may download a model or open a run at a service. `loragen.testing` sees more.
"""

import inspect
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from pydantic import BaseModel

from loragen.core import protocols
from loragen.core.errors import PluginError, listing
from loragen.core.plugins import Fault, Plugin, load_class, scanned

PROTOCOLS: dict[str, type] = {
    "logger": protocols.RunLogger,
    "encoder": protocols.Encoder,
    "decoder": protocols.Decoder,
    "schedule": protocols.Schedule,
    "objective": protocols.Objective,
}
MODULE = "torch.nn.modules.module.Module"
OPTIONAL = {"finalize", "to"}
"""Methods of `Objective` that do nothing if a plugin does not define them."""


def diagnose() -> tuple[Sequence[Plugin], list[Fault]]:
    """Returns all plugins, and everything that can be seen to be wrong, in a stable order."""
    plugins, found = scanned()
    faults = list(found)
    for plugin in sorted(plugins, key=lambda one: (one.kind, one.name, one.distribution)):
        subject = f"{plugin.kind} '{plugin.name}' of {plugin.origin}"
        others = [
            f"{one.origin} ({one.target})"
            for one in plugins
            if (one.kind, one.name) == (plugin.kind, plugin.name) and one is not plugin
        ]
        if others:
            clash = f"offered by {listing(others)}, too: uninstall one of them"
            faults.append(Fault(subject, clash))
        try:
            cls = load_class(plugin)
        except PluginError as error:
            faults.append(Fault(subject, str(error).partition(" does not load: ")[2]))
        else:
            reasons = broken_promises(plugin.kind, cls)
            faults += [Fault(subject, f"{plugin.target}: {reason}") for reason in reasons]
    return plugins, faults


def broken_promises(kind: str, cls: Any) -> list[str]:
    """Returns what a class lacks of the protocol of its kind, a line each."""
    if not isinstance(cls, type):
        return [f"is {cls!r}, not a class"]
    reasons = []
    config = getattr(cls, "Config", None)
    if not (isinstance(config, type) and issubclass(config, BaseModel)):
        reasons.append("has no nested Config, a pydantic BaseModel with its options")
    elif config.model_config.get("extra") != "forbid":
        reasons.append('its Config accepts unknown options; declare it with extra="forbid"')
    protocol = PROTOCOLS[kind]
    arguments = list(inspect.signature(vars(protocol)["__init__"]).parameters)[1:]
    with suppress(ValueError):  # some classes have no signature
        try:
            inspect.signature(cls).bind(*arguments)
        except TypeError as error:
            reasons.append(f"cannot be constructed from ({', '.join(arguments)}): {error}")
    is_module = any(f"{base.__module__}.{base.__name__}" == MODULE for base in cls.__mro__)
    if kind in ("encoder", "decoder") and not is_module:
        reasons.append("is no torch.nn.Module")
    elif missing := _missing(protocol, cls):
        reasons.append(f"lacks {listing(missing)} of the protocol {protocol.__name__}")
    return reasons


def _missing(protocol: type, cls: type) -> list[str]:
    """Returns the members that a protocol leaves to its plugins and a class does not have.

    Attributes may be set by the constructor, so that one which the class's source mentions as
    `self.name` counts as there.
    """
    methods = [
        name
        for name, member in vars(protocol).items()
        if inspect.isfunction(member) and (name == "__call__" or not name.startswith("_"))
    ]
    attributes = {
        *(name for name, member in vars(protocol).items() if isinstance(member, property)),
        *(name for name, of in protocol.__annotations__.items() if "ClassVar" not in of),
    }
    bases = [base for base in cls.__mro__ if base is not protocol]
    defined = {name: member for base in reversed(bases) for name, member in vars(base).items()}
    if getattr(defined.get("forward"), "__name__", "") == "_forward_unimplemented":
        del defined["forward"]
        methods = ["forward" if name == "__call__" else name for name in methods]  # which calls it
    sources = []
    for base in bases:
        if not base.__module__.startswith(("torch.", "builtins", "typing")):
            with suppress(OSError, TypeError):
                sources.append(inspect.getsource(base))
    mentioned = set(re.findall(r"\bself\.(\w+)", "\n".join(sources))) if sources else attributes
    return [
        *(name for name in methods if name not in defined and name not in OPTIONAL),
        *(name for name in sorted(attributes) if name not in defined.keys() | mentioned),
    ]
