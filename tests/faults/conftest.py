"""The command line in-process, as for the tests of the commands."""

from tests.cli.conftest import fails, loragen  # noqa: F401  # fixtures
