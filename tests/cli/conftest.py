"""The command line in-process, and what every failure of it must look like."""

import pytest
from typer.testing import CliRunner

from loragen.cli.main import app


@pytest.fixture
def loragen(tmp_path, monkeypatch):
    """`loragen("lora", "train", ...)`, in an empty working directory."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def run(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    run.work = work
    return run


@pytest.fixture
def fails(loragen):
    """`fails(2, ...)` runs, expects the exit code and one `error:` line, and gives its text."""

    def run(code, *arguments, lines=1):
        before = sorted(loragen.work.rglob("*"))
        result = loragen(*arguments)
        assert result.exit_code == code, result.output
        assert result.stdout == ""
        assert "Traceback" not in result.stderr
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == lines, result.stderr
        assert sorted(loragen.work.rglob("*")) == before, "something is left behind"
        text = [line.removeprefix("error: ") for line in errors]
        return text[0] if lines == 1 else text

    run.loragen = loragen
    return run
