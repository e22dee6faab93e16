"""Looks up plugins of all kinds by name, and imports the class of the chosen name alone."""

import logging
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


def describe(kind: str, name: str) -> Plugin:
    """Returns the plugin of a name, without importing its class.

    Raises PluginError for an unknown kind or name, and for a name that two distributions offer.
    """
    if kind not in KINDS:
        raise PluginError(
            f"unknown kind of plugin '{kind}'.{did_you_mean(kind, KINDS)} Kinds: {listing(KINDS)}"
        )
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
    plugin = describe(kind, name)
    module_name, _, attribute = plugin.target.partition(":")
    try:
        return getattr(import_module(module_name), attribute)
    except (Exception, SystemExit) as error:  # a third-party module may raise anything
        raise PluginError(
            f"{kind} '{name}' of {plugin.origin} does not load: "
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
        problems = [(".".join(map(str, one["loc"])), one["msg"]) for one in error.errors()]
        raise PluginError(*(f"{kind} {name}: {key}: {why}" for key, why in problems)) from None
    return plugin(config, *arguments)


@cache
def installed() -> tuple[Plugin, ...]:
    """Returns all installed plugins. A distribution whose entry point does not load, or whose hooks
    fail, is left out with one warning."""
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    # An entry point is listed twice if an editable install is also on sys.path.
    entries = {entry.value: entry for entry in entry_points(group=GROUP)}
    for entry in entries.values():
        try:
            manager.register(entry.load(), name=entry.value)
            manager.check_pending()  # refuses hooks that have no specification
        except (Exception, SystemExit) as error:  # noqa: BLE001  # a faulty plugin must not stop the command
            manager.unregister(name=entry.value)
            _warn(entry, error)
    found = []
    for kind in KINDS:
        for implementation in getattr(manager.hook, f"loragen_{kind}s").get_hookimpls():
            entry = entries[implementation.plugin_name]
            try:
                table = dict(implementation.function())
            except (Exception, SystemExit) as error:  # noqa: BLE001  # a faulty plugin must not stop the command
                _warn(entry, error)
                continue
            found += [Plugin(kind, str(n), str(table[n]), *_origin(entry)) for n in table]
    return tuple(found)


def _origin(entry: EntryPoint) -> tuple[str, str]:
    """Returns (distribution, version)."""
    return (entry.dist.name, entry.dist.version) if entry.dist else ("unknown", "?")


def _warn(entry: EntryPoint, error: BaseException) -> None:
    reason = str(error).splitlines()[-1].strip() if str(error) else ""
    log.warning(
        "plugin '%s' of %s (%s) is left out: %s: %s",
        entry.name,
        " ".join(_origin(entry)),
        entry.value,
        type(error).__name__,
        reason,
    )
