"""The command line in-process, and what every failure of it must look like."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from loragen.cli.main import app
from loragen.core.run.directory import MANIFEST


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
        assert sorted(loragen.work.rglob("*")) == before, "a failed command left files"
        text = [line.removeprefix("error: ") for line in errors]
        return text[0] if lines == 1 else text

    run.loragen = loragen
    return run


@pytest.fixture
def run(collection):
    return collection.runs["colors"]


@pytest.fixture
def file(collection):
    return collection.file("colors")


@pytest.fixture
def stopped(run, tmp_path):
    """A copy of the run, killed after step 6: its manifest lists no step."""
    copy = shutil.copytree(run, tmp_path / "stopped")
    for step in (7, 8):
        (copy / "checkpoints" / f"checkpoint-step-00{step}.ckpt").unlink()
    lines = (copy / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    kept = "".join(line for line in lines if json.loads(line)["step"] <= 6)
    (copy / "metrics.jsonl").write_text(kept, encoding="utf-8")
    manifest = json.loads((copy / MANIFEST).read_text(encoding="utf-8"))
    manifest |= {"status": "running", "steps": []}
    (copy / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return copy
