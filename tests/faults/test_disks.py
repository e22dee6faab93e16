"""Full disks and read-only places: one line, nothing half written, an exact resume."""

import json
import shutil
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

from loragen.core.adapter.files import read_adapter
from loragen.core.config import dump
from loragen.core.data.dataset import Dataset
from loragen.core.errors import WriteError
from loragen.core.files import reserve, write_errors, write_json, written_atomically
from loragen.core.lora.train import train_adapter
from loragen.core.progress import Silent
from loragen.core.run.directory import LoraManifest, read_manifest
from loragen.core.run.loggers import MetricsLog
from tests.conftest import rows_of

posix = pytest.mark.skipif(sys.platform == "win32", reason="limits and mounts of POSIX")


@contextmanager
def mounted(place, *options):
    """A file system in memory; skips where this process must not mount one."""
    place.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", *options, "tmpfs", place]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system can be mounted by root alone")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


@pytest.fixture
def small(tmp_path):
    """A disk of 400 KiB."""
    with mounted(tmp_path / "small", "-o", "size=400k") as place:
        yield place


@pytest.fixture
def read_only(tmp_path):
    """A directory on a read-only disk; root may write to one that is only marked so."""
    with mounted(tmp_path / "read-only", "-o", "size=400k") as place:
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        yield place


def fill(place, leave):
    """Fills a disk up to some bytes."""
    free = shutil.disk_usage(place).free
    (place / "filler").write_bytes(bytes(max(0, free - leave)))


# ---------------------------------------------------------------------------- full disks


@posix
def test_whatever_library_writes_a_full_disk_is_one_line(small):
    from safetensors.torch import save_file

    fill(small, 40_000)
    tensor = torch.zeros(100_000)

    def in_memory(file):
        import numpy as np

        array = np.lib.format.open_memmap(file, "w+", np.float32, (100_000,))
        reserve(file)  # without it, the next line ends the process
        array[:] = 1

    writers = {
        "torch": lambda file: torch.save({"a": tensor}, file),
        "safetensors": lambda file: save_file({"a": tensor}, file),
        "bytes": lambda file: file.write_bytes(bytes(400_000)),
        "memory": in_memory,
    }
    for name, write in writers.items():
        target = small / name
        with pytest.raises(WriteError) as error, written_atomically(target) as temporary:
            write(temporary)
        assert str(error.value) == f"{target}: cannot be written: No space left on device"
    with pytest.raises(WriteError, match="No space left"):
        write_json(small / "x.json", ["x" * 400_000])
    assert [path.name for path in small.iterdir()] == ["filler"]


def test_other_errors_are_left_as_they_are(tmp_path):
    for error in (RuntimeError("a bug"), FileNotFoundError(2, "none"), KeyError("x")):
        with pytest.raises(type(error)), write_errors(tmp_path):
            raise error


@posix
def test_metrics_that_could_not_be_written_are_written_later(small, caplog):
    log = MetricsLog(small / "metrics.jsonl")
    log.log_metrics({"train/loss": 1.0}, 1)
    fill(small, 0)
    for step in range(2, 400):
        log.log_metrics({"train/loss": 1.0}, step)
    assert caplog.text.count("cannot be written: No space left on device") == 1
    whole = [json.loads(line)["step"] for line in log.file.read_text().splitlines()]
    with pytest.raises(WriteError):
        log.flush()
    assert whole == list(range(1, len(whole) + 1))  # no line is cut
    (small / "filler").unlink()
    log.log_metrics({"train/loss": 1.0}, 400)
    steps = [json.loads(line)["step"] for line in log.file.read_text().splitlines()]
    assert steps == list(range(1, 401))


@posix
def test_a_training_on_a_full_disk_fails_in_one_line_and_resumes_exactly(
    small, loragen, lora_config, dataset, base, tmp_path
):
    settings = {"final_model": "none", "checkpoints.first_step": 3}
    rows = dataset(rows_of(("red", "green", "blue"), count=40))
    whole = train_adapter(lora_config(settings), Dataset(rows, "colors"), base, Silent()).directory
    config = lora_config({**settings, "runs_dir": str(small / "runs")})
    (tmp_path / "c.yaml").write_text(dump(config), encoding="utf-8")
    fill(small, 90_000)
    result = loragen("lora", "train", "--config", tmp_path / "c.yaml", "--dataset", rows)
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.stderr
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert error.endswith("cannot be written: No space left on device")
    (run,) = (small / "runs").iterdir()
    kept = list((run / "checkpoints").iterdir())
    assert not [path for path in run.rglob("*") if path.name.endswith(".unfinished")]
    assert all(torch.load(file, weights_only=True)["state_dict"] for file in kept)

    (small / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,size=20m", small], check=True)
    result = loragen("lora", "train", "--resume", run)
    assert result.exit_code == 0, result.output
    assert read_manifest(run, LoraManifest).status == "success"
    one, other = (read_adapter(directory / "adapter").tensors for directory in (run, whole))
    assert all(torch.equal(one[key], other[key]) for key in other)
    losses = [
        [json.loads(line).get("train/loss") for line in (r / "metrics.jsonl").open()]
        for r in (run, whole)
    ]
    assert losses[0] == losses[1]


@posix
@pytest.mark.parametrize("kib", [4, 12, 40])
def test_a_limit_of_file_sizes_is_one_line(loragen, run, tmp_path, kib):
    """As a quota: at whichever file it is reached, in a process of its own."""
    code = (
        f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({kib * 1024},) * 2)\n"
        "from loragen.cli.main import main; sys.argv[0] = 'loragen'; main()"
    )
    out = tmp_path / "merged"
    arguments = ("lora", "export", run, "--output", out, "--merge")
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, check=False
    )
    assert result.returncode == 1
    (error,) = result.stderr.decode().splitlines()
    assert error.startswith(f"error: {out}") and "cannot be written: " in error
    assert not out.exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".merged")]


# ---------------------------------------------------------------------------- read-only places


@posix
def test_an_output_that_cannot_be_written_is_refused_before_it_starts(
    read_only, fails, run, experiment, collection, tmp_path, monkeypatch
):
    started = []
    for name in ("loragen.core.evaluation.contest.evaluate_generator",):
        monkeypatch.setattr(name, lambda *_, **__: started.append(1))
    rows = collection.file("colors")
    old = tmp_path / "old.yaml"
    old.write_text("data:\n  batch_size: 4\n", encoding="utf-8")
    prompt = ("--prompt", "Question 1 about red?")
    for arguments in (
        ("gen", "eval", "--model", experiment, "--dataset", rows, "--output", read_only / "x"),
        ("gen", "infer", "--model", experiment, *prompt, "--output", read_only / "x"),
        ("gen", "infer", "--model", experiment, *prompt, "--output", read_only / "x.pt"),
        ("lora", "export", run, "--output", read_only / "x"),
        ("lora", "train", "--dataset", rows, "--runs-dir", read_only / "x"),
        ("ckpt", "analyze", run, "--html", read_only / "x.html"),
        ("data", "prepare", "--source", rows, "--output", read_only / "x"),
        ("config", "migrate", old, "--command", "lora", "--output", read_only / "x.yaml"),
        ("demo", "--output", read_only / "x"),
    ):
        error = fails(2, *arguments)
        assert "cannot be written: Read-only file system" in error, error
    assert not started


@posix
def test_a_read_only_run_is_not_resumed(run, loragen, tmp_path):
    with mounted(tmp_path / "disk", "-o", "size=20m") as place:
        copy = shutil.copytree(run, place / "run")
        (copy / "checkpoints" / "checkpoint-step-008.ckpt").unlink()
        manifest = json.loads((copy / "manifest.json").read_text())
        write_json(copy / "manifest.json", {**manifest, "status": "interrupted"})
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        result = loragen("lora", "train", "--resume", copy)
        assert result.exit_code == 2
        (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert error == f"error: {copy}: cannot be written: Read-only file system"


@posix
def test_an_evaluation_that_cannot_be_written_is_printed(
    loragen, experiment, collection, tmp_path, monkeypatch
):
    """The place was fine when it began."""
    from loragen.core.evaluation import contest, report

    def evaluate(*_, **__):
        return {"found": 1}

    def full(*_):
        raise WriteError("results.json: cannot be written: No space left on device")

    monkeypatch.setattr(contest, "evaluate_generator", evaluate)
    monkeypatch.setattr(report, "write_results", full)
    evaluation = ("gen", "eval", "--model", experiment, "--dataset", collection.file("colors"))
    result = loragen(*evaluation, "--json", "--output", tmp_path / "x")
    assert result.exit_code == 1
    assert json.loads(result.stdout) == {"found": 1}
    assert "cannot be written" in result.stderr


@posix
def test_a_read_only_cache_is_done_without(read_only, gen_config, caplog, tmp_path):
    from loragen.core.learning.train import train

    caplog.set_level("WARNING", "loragen")
    made = train(gen_config({"training.max_steps": 2}), Silent())
    again = train(gen_config({"training.max_steps": 2, "data.cache_dir": str(read_only)}), Silent())
    lines = [one for one in caplog.text.splitlines() if "Read-only file system" in one]
    assert len(lines) == 1
    assert "what the cache lacks is computed for this command" in lines[0]
    assert made.manifest.metrics == again.manifest.metrics


@posix
def test_what_a_read_only_cache_has_is_read(gen_config, tmp_path, monkeypatch):
    from loragen.core.learning import arrays
    from loragen.core.learning.train import train

    with mounted(tmp_path / "disk", "-o", "size=20m") as place:
        settings = {"training.max_steps": 2, "data.cache_dir": str(place / "cache")}
        made = train(gen_config(settings), Silent())
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        monkeypatch.setattr(arrays, "write_embeddings", lambda *_: pytest.fail("embedded again"))
        assert train(gen_config(settings), Silent()).manifest.metrics == made.manifest.metrics
        del made
