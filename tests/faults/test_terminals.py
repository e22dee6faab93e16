"""Terminals, pipes and encodings: no text stops a command, and a training outlives whoever reads
its output."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loragen.core.config import dump
from loragen.core.run.directory import LoraManifest, read_manifest
from tests.conftest import rows_of

posix = pytest.mark.skipif(sys.platform == "win32", reason="descriptors and signals of POSIX")
STEPS = 60
MIXED = [{"prompt": f"Größe {i}, 数据 {i}, ‖ΔW‖?", "response": "blau"} for i in range(40)]


def command(*arguments):
    return [sys.executable, "-m", "loragen", *map(str, arguments)]


@pytest.fixture
def preview(dataset, base_dir):
    return command("data", "preview", dataset(MIXED), "--base-model", base_dir, "--limit", 40)


@pytest.fixture
def training(dataset, lora_config, tmp_path):
    """The command of a training of some seconds, and a function that returns its run."""
    file = tmp_path / "c.yaml"
    settings = {"training.max_steps": STEPS, "checkpoints.first_step": STEPS - 1}
    file.write_text(dump(lora_config(settings)), encoding="utf-8")

    def run():
        (directory,) = (tmp_path / "runs").iterdir()
        return directory

    rows = dataset(rows_of(("red", "green", "blue")))
    return command("lora", "train", "--config", file, "--dataset", rows), run


def metrics_of(run):
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "gbk", "latin-1:strict", "utf-16"])
def test_no_encoding_stops_a_command(preview, encoding):
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    for arguments in (command("lora", "train", "--help"), preview, [*preview, "--json"]):
        result = subprocess.run(arguments, env=environment, capture_output=True, check=False)
        assert (result.returncode, result.stderr) == (0, b""), result.stderr
        assert len(result.stdout) > 1000
    read = result.stdout.decode("utf-16" if encoding == "utf-16" else "ascii")
    found = json.loads(read)  # escaped, so that nothing of the text is lost
    assert "数据 0" in found["samples"][0]["prompt"]


@posix
def test_a_reader_that_ends_ends_nothing(preview):
    """As `| head -1`, which reads a line of many and closes the pipe."""
    process = subprocess.Popen(preview, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    _, error = process.communicate(timeout=100)
    assert (process.returncode, error) == (0, b"")


@posix
@pytest.mark.parametrize("closed", [(1,), (1, 2), (0, 1, 2)])
def test_closed_descriptors_are_the_null_device(preview, closed, tmp_path):
    close = " ".join(f"{number}>&-" for number in closed)
    shell = subprocess.run(
        ["sh", "-c", f'exec "$@" {close}', "sh", *preview], capture_output=True, check=False
    )
    assert (shell.returncode, shell.stdout, shell.stderr) == (0, b"", b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has the full disk /dev/full")
def test_output_that_is_lost_is_an_error(preview):
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(preview, stdout=full, stderr=subprocess.PIPE, check=False)
    assert result.returncode == 1
    assert result.stderr.decode().startswith("error: stdout: No space left on device")


@posix
def test_a_name_that_is_no_text_is_printed_as_it_is(base_dir, tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9.jsonl"
    file = Path(os.fsdecode(name))
    file.write_text('{"prompt": "a", "response": "b"}\n', encoding="utf-8")
    result = subprocess.run(
        command("data", "preview", file, "--base-model", base_dir),
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(name + b"\n")


@posix
def test_a_training_outlives_the_reader_of_its_output(training):
    arguments, run = training
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait(100) == 0
    assert read_manifest(run(), LoraManifest).status == "success"
    assert metrics_of(run()) == list(range(1, STEPS + 1))


def in_terminal(arguments, ignore_hangup):
    """Starts a command as the foreground of a new terminal; gives the process and the terminal."""
    import fcntl
    import pty
    import termios

    terminal, inner = pty.openpty()

    def prepare():
        if ignore_hangup:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        arguments, stdin=inner, stdout=inner, stderr=inner, preexec_fn=prepare
    )
    os.close(inner)
    return process, terminal


@posix
@pytest.mark.parametrize("nohup", [False, True], ids=["plain", "nohup"])
def test_a_terminal_that_is_closed(training, nohup, tmp_path):
    """Its SIGHUP ends a run as SIGTERM does: the step is saved. Under nohup the run goes on."""
    arguments, run = training
    process, terminal = in_terminal(arguments, nohup)
    deadline = time.monotonic() + 100
    while not any(tmp_path.glob("runs/*/metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.close(terminal)
    assert process.wait(100) == (0 if nohup else 130)
    manifest, steps = read_manifest(run(), LoraManifest), metrics_of(run())
    assert manifest.status == ("success" if nohup else "interrupted")
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) == STEPS if nohup else (run() / "checkpoints" / "last.ckpt").is_file()


def test_streams_that_are_no_files_stay(monkeypatch):
    """As in a notebook or a test, whose stdout is an object of its own."""
    from loragen.cli.streams import lost_output, make_streams_last

    text = io.StringIO()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, text)
    make_streams_last()
    assert sys.stdout is sys.stderr is text
    assert lost_output() is None
