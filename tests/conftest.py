"""What every test needs: the machine's settings stay out, and nothing leaks to the next test."""

import logging
import os
import sys
from pathlib import Path

import pytest

from loragen.core import plugins


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    """Settings of whoever runs the tests do not reach them."""
    for name in list(os.environ):
        if name.startswith(("LORAGEN_", "SWANLAB_")):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def restored_log():
    """The command line points the `loragen` logger at stderr; `caplog` needs it as it was."""
    logger = logging.getLogger("loragen")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture
def install(tmp_path, monkeypatch):
    """`install("their-package", hooks)` puts a package with metadata on `sys.path`, as pip would.

    Its hook module is named after it; `modules` are further ones, name -> source.
    """
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    names: set[str] = set()

    def put(distribution: str, hooks: str, version: str = "1.0", **modules: str) -> Path:
        module = distribution.replace("-", "_")
        for name, source in {module: hooks, **modules}.items():
            (site / f"{name}.py").write_text(source, encoding="utf-8")
            names.add(name)
        info = site / f"{module}-{version}.dist-info"
        info.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        (info / "METADATA").write_text(metadata, encoding="utf-8")
        (info / "entry_points.txt").write_text(f"[loragen]\nit = {module}\n", encoding="utf-8")
        plugins.installed.cache_clear()
        return site

    yield put
    plugins.installed.cache_clear()
    for name in names:
        sys.modules.pop(name, None)
