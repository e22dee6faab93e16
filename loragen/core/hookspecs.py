"""The five hooks by which a plugin offers its classes to loragen.

Each maps names to ``"module:Class"``, a class of the kind that `loragen.core.protocols` describes.
The class is imported only if a user chooses its name, and the module with the hook functions must
be light too: it must not import torch.
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
