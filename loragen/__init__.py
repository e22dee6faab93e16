"""loragen: prompts in, LoRA adapters out.

What stands here is what a plugin author needs, and `Generator`, which is imported when it is first
asked for; nothing of the rest is heavy.
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
    """`Generator`, with torch behind it, on first use."""
    if name == "Generator":
        from loragen.core.generator.model import Generator

        return Generator
    raise AttributeError(f"module 'loragen' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
