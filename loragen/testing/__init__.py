"""Checks that a plugin keeps the contracts of `loragen.core.protocols`, for its author's tests:

    from loragen.testing import check_schedule
    from my_package.linear import Linear

    def test_contract():
        check_schedule(Linear, final_share=0.1)

Keyword arguments are options of the plugin's Config. A check raises an AssertionError that names
the broken promise. The built-in plugins pass the same checks. `write_base` writes small base
models with odd tokenizers and chat templates.
"""

from loragen.testing.contracts import (
    check_decoder,
    check_encoder,
    check_logger,
    check_objective,
    check_schedule,
    grid,
)
from loragen.testing.tokenizers import write_base

__all__ = [
    "check_decoder",
    "check_encoder",
    "check_logger",
    "check_objective",
    "check_schedule",
    "grid",
    "write_base",
]
