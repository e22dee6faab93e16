"""Configuration files of the original scripts, read as the command line reads them."""

import pytest

from loragen.cli.options import with_old_files
from loragen.core import config
from loragen.core.config import LoraTrainConfig
from loragen.core.errors import UsageError


def load(model, file, **layers):
    """Loads a file as `--config FILE` does, with an empty environment."""
    return with_old_files(
        model, file, lambda given: config.load(model, given, environment={}, **layers)
    )


@pytest.fixture
def configure(tmp_path, monkeypatch):
    """`configure(text)`: loads YAML text as `c.yaml` of the working directory."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "c.yaml"

    def read(text="", model=LoraTrainConfig, **layers):
        file.write_text(text, encoding="utf-8")
        return load(model, file.relative_to(tmp_path), **layers)

    return read


@pytest.fixture
def problems_of(configure):
    """`problems_of(text)`: the lines of the error that loading must raise."""

    def read(text, **options):
        with pytest.raises(UsageError) as error:
            configure(text, **options)
        return list(error.value.problems)

    return read
