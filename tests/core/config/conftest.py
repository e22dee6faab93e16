"""Configuration files in a working directory, with an empty environment."""

import pytest

from loragen.core.config import LoraTrainConfig, load


@pytest.fixture
def configure(tmp_path, monkeypatch):
    """Loads YAML text as `c.yaml` of the working directory, with an empty environment."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "c.yaml"

    def read(text="", model=LoraTrainConfig, environment=None, **layers):
        file.write_text(text, encoding="utf-8")
        return load(model, file.relative_to(tmp_path), environment=environment or {}, **layers)

    return read
