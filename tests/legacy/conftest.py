"""Configuration files of the original scripts, read as the command line reads them."""

import pytest

from loragen.cli.options import with_old_files
from loragen.core import config
from loragen.core.config import LoraTrainConfig
from loragen.core.errors import UsageError


def load(model, file, **layers):
    """As `--config FILE`."""
    return with_old_files(model, file, lambda given: config.load(model, given, **layers))


@pytest.fixture
def configure(tmp_path, monkeypatch):
    """Loads YAML text as `c.yaml` of the working directory, with an empty environment."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "c.yaml"

    def read(text="", model=LoraTrainConfig, environment=None, **layers):
        file.write_text(text, encoding="utf-8")
        return load(model, file.relative_to(tmp_path), environment=environment or {}, **layers)

    return read


@pytest.fixture
def problems_of(configure):
    """`problems_of(text, ...)`: every line of the error that it must be."""

    def read(text, **options):
        with pytest.raises(UsageError) as error:
            configure(text, **options)
        return list(error.value.problems)

    return read
