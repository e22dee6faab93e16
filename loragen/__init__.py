"""loragen: prompts in, LoRA adapters out.

Only what a plugin author needs stands here, and nothing of it is heavy.
"""

import pluggy

from loragen.core.errors import LoragenError

__version__ = "0.1.0"

hookimpl = pluggy.HookimplMarker("loragen")
"""Marks a function of a plugin module as an implementation of a loragen hook."""

__all__ = ["LoragenError", "__version__", "hookimpl"]
