"""What is opened once per command: a dataset file and a run's manifest are each read a single time.

The counts come from Python's audit event `open`, which every way of opening a file raises.
"""

import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loragen.cli.main import app
from loragen.core.run.directory import MANIFEST
from tests.conftest import TINY_GENERATOR, TINY_LORA

_counting: list[Counter] = []  # an audit hook cannot be removed: it counts for whoever is listening


def _hook(event, arguments):
    if event == "open" and _counting and isinstance(arguments[0], str):
        mode = arguments[1]
        if mode is None or not set(mode) & set("wax+"):
            _counting[-1][str(Path(arguments[0]).resolve())] += 1


sys.addaudithook(_hook)


@contextmanager
def reads():
    """The number of times that each file is opened for reading within the block."""
    _counting.append(Counter())
    try:
        yield _counting[-1]
    finally:
        _counting.pop()


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


def settings(tiny, **more):
    """`--set` options of a configuration of the tests."""
    import yaml

    pairs = {**tiny, **more}
    return [
        part
        for key, value in pairs.items()
        for part in ("--set", f"{key}={yaml.safe_dump(value, default_flow_style=True).strip()}")
    ]


def counted(counts, paths):
    return {Path(path).name: counts[str(Path(path).resolve())] for path in paths}


@pytest.fixture
def manifests(collection):
    return [run / MANIFEST for run in collection.runs.values()]


def test_lora_train_reads_a_dataset_and_each_earlier_manifest_once(collection, tmp_path):
    files = [collection.file(name) for name in collection.names]
    common = ["lora", "train", "--data-root", collection.data, "--runs-dir", tmp_path / "runs"]
    common += [part for file in files for part in ("--dataset", file)]
    common += ["--base-model", collection.base, *settings(TINY_LORA)]
    with reads() as counts:
        run(*common)
    assert counted(counts, files) == {file.name: 1 for file in files}
    earlier = list((tmp_path / "runs").glob(f"*/{MANIFEST}"))
    assert len(earlier) == 2
    with reads() as counts:
        run(*common)  # finished already: skipped
    assert {counts[str(file.resolve())] for file in earlier} == {1}
    assert counted(counts, files) == {file.name: 1 for file in files}


@pytest.mark.parametrize("objective", ["reconstruction", "behaviour"])
def test_gen_train_reads_a_dataset_and_a_manifest_once(
    collection, manifests, sbert_dir, tmp_path, objective
):
    files = [collection.file(name) for name in collection.names]
    options = {
        "training.objective": objective,
        "training.max_epochs": 1,
        "behaviour.max_steps": 1,
        "behaviour.batch_size": 2,
        "encoder.model": str(sbert_dir),
        "experiments_dir": str(tmp_path / "experiments"),
        "data.cache_dir": str(tmp_path / "cache"),
    }
    runs = [part for one in collection.runs.values() for part in ("--checkpoint-dir", one)]
    with reads() as counts:
        run("gen", "train", *runs, *settings(TINY_GENERATOR, **options))
    assert {counts[str(file.resolve())] for file in manifests} == {1}
    assert counted(counts, files) == {file.name: 1 for file in files}


def test_gen_train_of_a_folder_of_runs_reads_each_manifest_once(
    collection, manifests, sbert_dir, tmp_path
):
    options = {
        "training.max_epochs": 1,
        "encoder.model": str(sbert_dir),
        "experiments_dir": str(tmp_path / "experiments"),
        "data.cache_dir": str(tmp_path / "cache"),
    }
    folder = collection.runs["colors"].parent
    with reads() as counts:
        run("gen", "train", "--checkpoint-dir", folder, *settings(TINY_GENERATOR, **options))
    assert {counts[str(file.resolve())] for file in manifests} == {1}


def test_gen_eval_reads_a_dataset_and_a_manifest_once(collection, manifests, experiment, tmp_path):
    """The evaluated datasets are those that the generator was trained on: still one read each."""
    files = [collection.file(name) for name in collection.names]
    named = [part for file in files for part in ("--dataset", file)]
    arguments = ["gen", "eval", "--model", experiment, *named, "--draws", 2, "--limit", 4]
    arguments += ["--multi-task", "--cache-dir", tmp_path / "cache"]
    with reads() as counts:
        run(*arguments)
    assert {counts[str(file.resolve())] for file in manifests} == {1}
    assert counted(counts, files) == {file.name: 1 for file in files}
