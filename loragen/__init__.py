"""loragen: prompts in, LoRA adapters out.

It exports what a plugin needs, and `Generator`, which is imported at its first use, so that
`import loragen` does not import torch.
"""

from typing import TYPE_CHECKING, Any

import pluggy

from loragen.core.errors import LoragenError

if TYPE_CHECKING:
    from loragen.core.generator.model import Generator

__version__ = "0.1.0"

hookimpl = pluggy.HookimplMarker("loragen")
"""Marks a function of a plugin module as an implementation of a loragen hook."""

__all__ = ["Generator", "LoragenError", "__version__", "hookimpl"]


def __getattr__(name: str) -> Any:
    """Imports `Generator`, and with it torch, at its first use."""
    if name == "Generator":
        from loragen.core.generator.model import Generator

        return Generator
    raise AttributeError(f"module 'loragen' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
