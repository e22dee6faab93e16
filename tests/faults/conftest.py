"""The command line in-process, as for the tests of the commands."""

from tests.cli.conftest import fails, loragen, run  # noqa: F401  # fixtures
