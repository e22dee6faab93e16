"""Looks up plugins of all kinds by name, and imports the class of the chosen name alone."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy
from pydantic import ValidationError

from loragen.core import hookspecs
from loragen.core.errors import PluginError, did_you_mean, listing

GROUP = "loragen"
KINDS = ("logger", "encoder", "decoder", "schedule", "objective")
HOOKS = {kind: f"loragen_{kind}s" for kind in KINDS}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plugin:
    """One plugin that a distribution offers under a name."""

    kind: str
    name: str
    target: str
    """``"module:Class"``"""
    distribution: str
    version: str

    @property
    def origin(self) -> str:
        return f"{self.distribution} {self.version}"


def names(kind: str) -> list[str]:
    """Returns the installed names of a kind, sorted."""
    return sorted({plugin.name for plugin in installed() if plugin.kind == kind})


def check_kind(kind: str) -> None:
    """Raises PluginError for an unknown kind."""
    if kind not in KINDS:
        raise PluginError(
            f"unknown kind of plugin '{kind}'.{did_you_mean(kind, KINDS)} Kinds: {listing(KINDS)}"
        )


def describe(kind: str, name: str) -> Plugin:
    """Returns the plugin of a name, without importing its class.

    Raises PluginError for an unknown kind or name, and for a name that two distributions offer.
    """
    check_kind(kind)
    offers = [plugin for plugin in installed() if (plugin.kind, plugin.name) == (kind, name)]
    if not offers:
        known = names(kind)
        raise PluginError(
            f"unknown {kind} '{name}'.{did_you_mean(name, known)} Installed: {listing(known)}"
        )
    if len(offers) > 1:
        origins = " and ".join(f"{plugin.origin} ({plugin.target})" for plugin in offers)
        raise PluginError(f"{kind} '{name}' is offered by {origins}: uninstall one of them")
    return offers[0]


def find(kind: str, name: str) -> Any:
    """Imports and returns the class of a name; no other plugin is imported.

    Raises PluginError if the name is unknown or ambiguous, or its class does not import.
    """
    return load_class(describe(kind, name))


def load_class(plugin: Plugin) -> Any:
    """Imports and returns a plugin's class. Raises PluginError if that fails."""
    module_name, _, attribute = plugin.target.partition(":")
    try:
        if not module_name or not attribute:
            raise ValueError("expected 'module:Class'")
        return getattr(import_module(module_name), attribute)
    except (Exception, SystemExit) as error:  # a third-party module may raise anything
        raise PluginError(
            f"{plugin.kind} '{plugin.name}' of {plugin.origin} does not load: "
            f"{plugin.target}: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error


def create(kind: str, name: str, options: Mapping[str, Any], *arguments: Any) -> Any:
    """Constructs a plugin from its options, which its `Config` validates, and the arguments that
    its protocol adds. Raises PluginError for options that do not validate: those of a configuration
    have been validated before, those in a file of another version may not fit."""
    plugin = find(kind, name)
    try:
        config = plugin.Config.model_validate(options)
    except ValidationError as error:
        raise PluginError(
            *(
                ": ".join([f"{kind} {name}", *map(str, one["loc"]), one["msg"]])
                for one in error.errors()
            )
        ) from None
    return plugin(config, *arguments)


@cache
def installed() -> tuple[Plugin, ...]:
    """Returns all installed plugins. A distribution whose entry point does not load, or whose hooks
    fail, is left out with one warning."""
    found, faults = scanned()
    for fault in faults:
        if fault.left_out:
            log.warning("%s is left out: %s", fault.subject, fault.reason)
    return found


@dataclass(frozen=True)
class Fault:
    """What is wrong with an entry point or a plugin."""

    subject: str
    """`schedule 'saw' of theirs 1.0`, or `plugin 'it' of theirs 1.0 (their_module)`"""
    reason: str
    left_out: bool = False
    """Whether plugins are missing from those installed because of it."""


def scanned() -> tuple[tuple[Plugin, ...], tuple[Fault, ...]]:
    """Imports the module of every entry point; returns the plugins that their hooks name, and what
    is wrong with entry points and hooks. No class is imported."""
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    faults = []
    # An entry point is listed twice if an editable install is also on sys.path.
    entries = {entry.value: entry for entry in entry_points(group=GROUP)}
    for entry in entries.values():
        try:
            module = entry.load()
            manager.register(module, name=entry.value)
            manager.check_pending()  # refuses hooks that have no specification
        except (Exception, SystemExit) as error:  # noqa: BLE001  # a faulty plugin must not stop the command
            manager.unregister(name=entry.value)
            faults.append(_left_out(entry, error))
            continue
        if not manager.get_hookcallers(module):
            plain = [name for name in HOOKS.values() if hasattr(module, name)]
            reason = f"{listing(plain)} without @hookimpl is no hook" if plain else "it has no hook"
            known = f"{reason}; hooks: {listing(list(HOOKS.values()))}"
            faults.append(Fault(_subject(entry), known))
    plugins = []
    for kind, hook in HOOKS.items():
        for implementation in getattr(manager.hook, hook).get_hookimpls():
            entry = entries[implementation.plugin_name]
            try:
                table = dict(implementation.function())
            except (Exception, SystemExit) as error:  # noqa: BLE001  # a faulty plugin must not stop the command
                faults.append(_left_out(entry, error))
                continue
            plugins += [Plugin(kind, str(n), str(table[n]), *_origin(entry)) for n in table]
    return tuple(plugins), tuple(faults)


def _origin(entry: EntryPoint) -> tuple[str, str]:
    """Returns (distribution, version)."""
    return (entry.dist.name, entry.dist.version) if entry.dist else ("unknown", "?")


def _subject(entry: EntryPoint) -> str:
    return f"plugin '{entry.name}' of {' '.join(_origin(entry))} ({entry.value})"


def _left_out(entry: EntryPoint, error: BaseException) -> Fault:
    """Returns an error in one line; to an unknown hook it adds the known one that was meant."""
    reason = str(error).splitlines()[-1].strip() if str(error) else ""
    unknown = re.search(r"unknown hook '(\w+)'", reason)
    hint = did_you_mean(unknown[1], HOOKS.values()) if unknown else ""
    return Fault(_subject(entry), f"{type(error).__name__}: {reason}{hint}", left_out=True)
