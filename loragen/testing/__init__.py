"""The promises of `loragen.core.protocols` as checks. A plugin's author calls them from pytest:

    from loragen.testing import check_schedule
    from my_package.linear import Linear

    def test_contract():
        check_schedule(Linear, final_share=0.1)

Keyword arguments are the options of the plugin's Config. A broken promise is an AssertionError that
names it. The built-in plugins pass the same checks.
"""

from loragen.testing.decoders import check_decoder, grid
from loragen.testing.encoders import check_encoder
from loragen.testing.loggers import check_logger
from loragen.testing.schedules import check_schedule

__all__ = ["check_decoder", "check_encoder", "check_logger", "check_schedule", "grid"]
