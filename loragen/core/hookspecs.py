"""The whole contract between loragen and a plugin: five hooks that return names.

Each maps a name to the ``"module:Class"`` that keeps the promise of `loragen.core.protocols`.
The class is imported only when a user chooses that name, so the module with the hook functions
must stay light: no torch at import.
"""

from collections.abc import Mapping

import pluggy

hookspec = pluggy.HookspecMarker("loragen")


@hookspec
def loragen_loggers() -> Mapping[str, str]:  # type: ignore[empty-body]  # a spec has no body
    """Name -> ``"module:Class"`` of experiment loggers."""


@hookspec
def loragen_encoders() -> Mapping[str, str]:  # type: ignore[empty-body]  # a spec has no body
    """Name -> ``"module:Class"`` of text encoders."""


@hookspec
def loragen_decoders() -> Mapping[str, str]:  # type: ignore[empty-body]  # a spec has no body
    """Name -> ``"module:Class"`` of parameter decoders."""


@hookspec
def loragen_schedules() -> Mapping[str, str]:  # type: ignore[empty-body]  # a spec has no body
    """Name -> ``"module:Class"`` of learning-rate schedules."""


@hookspec
def loragen_objectives() -> Mapping[str, str]:  # type: ignore[empty-body]  # a spec has no body
    """Name -> ``"module:Class"`` of training objectives of a generator."""
