"""The loggers of W&B, MLflow, Trackio and CSV, with the real libraries, and all loggers at once."""

import csv
import json
import logging
import sqlite3
import sys
from contextlib import closing
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import psutil
import pytest

from loragen.core.data.dataset import Dataset
from loragen.core.errors import LoragenError, UsageError
from loragen.core.lora.train import train_adapter
from loragen.core.plugins import create, find
from loragen.core.progress import Silent
from loragen.core.protocols import RunInfo
from loragen.core.run.loggers import RunLoggers
from loragen.core.run.metrics import read_metrics
from loragen.plugins.loggers import _process
from loragen.testing import check_logger

PACKAGES = {"wandb": ["wandb"], "mlflow": ["mlflow", "sqlalchemy"], "trackio": ["trackio"]}

pytestmark = pytest.mark.timeout(600)  # a start of all libraries, on a busy machine


def needs(*names):
    for name in names:
        for package in PACKAGES.get(name, []):
            if find_spec(package) is None:  # an import would hide that the logger needs none
                pytest.skip(f"{package} is absent: loragen[{name}]")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run directory, and a home and working directory with no settings in them."""
    for name in ("home", "run"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "home")
    config = {"seed": 42, "data": {"root": "x"}}
    return RunInfo(tmp_path / "run", "arc_lora_1", "loragen-lora", config)


def children(before=()):
    return [one for one in psutil.Process().children() if one not in before]


def rows(file, query):
    with closing(sqlite3.connect(file)) as database:
        return database.execute(query).fetchall()


def leveldb_messages(content):
    """The messages of a LevelDB log: pieces with checksum, length and kind, in blocks of 32 KiB."""
    place, message = 7, b""  # after W&B's header
    while place < len(content):
        if 2**15 - place % 2**15 < 7:  # no room for another piece: the next block
            place += 2**15 - place % 2**15
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        message += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last piece
            yield message
            message = b""


def wandb_points(directory):
    """(step, training loss) of every part of a run, from the records of W&B's files."""
    from wandb.proto.wandb_internal_pb2 import Record

    points = []
    for file in sorted(directory.glob("wandb_logs/wandb/offline-run-*/run-*.wandb")):
        for message in leveldb_messages(file.read_bytes()):
            items = Record.FromString(message).history.item
            entry = {one.key or one.nested_key[0]: json.loads(one.value_json) for one in items}
            if "train/loss" in entry:
                points.append((entry["trainer/global_step"], entry["train/loss"]))
    return points


def mlflow_points(directory):
    query = "SELECT step, value FROM metrics WHERE key = 'train/loss' ORDER BY timestamp, step"
    return rows(directory / "mlflow_logs" / "mlflow.db", query)


def trackio_points(directory):
    (file,) = directory.glob("trackio_logs/*.db")
    found = rows(file, "SELECT step, metrics FROM metrics ORDER BY id")
    entries = [(step, json.loads(metrics)) for step, metrics in found]
    return [(step, entry["train/loss"]) for step, entry in entries if "train/loss" in entry]


def csv_points(directory):
    with (directory / "csv_logs" / "metrics.csv").open(newline="") as file:
        entries = list(csv.DictReader(file))
    return [(int(e["step"]), float(e["train/loss"])) for e in entries if e.get("train/loss")]


def tensorboard_points(directory):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory / "tensorboard_logs")).Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss")]


def swanlab_points(directory):
    """SwanLab has no reader of its files: the steps that it names beside the loss."""
    (file,) = directory.glob("swanlab_logs/*/*.swanlab")
    return file.read_bytes().count(b"train/loss")


POINTS = {
    "wandb": wandb_points,
    "mlflow": mlflow_points,
    "trackio": trackio_points,
    "csv": csv_points,
    "tensorboard": tensorboard_points,
}


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio", "csv"])
def test_contract(name, tmp_path, run):
    needs(name)
    check_logger(find("logger", name), tmp_path / "run")


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio", "csv"])
def test_a_run_and_its_second_part(name, run, capfd, caplog):
    """Offline, without a word, and without a process that stays; the id is kept."""
    needs(name)
    before, modules = children(), set(sys.modules)
    first = create("logger", name, {})
    logger = first.open(run)
    for step in (1, 2, 3):
        logger.log_metrics({"train/loss": 1 / step, "train/准确率 (x)": 0.5}, step=step)
        logger.log_metrics({"val/loss": float("nan")}, step=step)
    logger.finalize("failed")
    first.close("interrupted")
    assert name == "csv" or name not in set(sys.modules) - modules
    assert POINTS[name](run.directory) == [(step, 1 / step) for step in (1, 2, 3)]
    second = create("logger", name, {})
    logger = second.open(replace(run, resume_id=first.run_id, resume_step=3))
    logger.log_metrics({"train/loss": 0.25}, step=4)
    logger.finalize("success")
    second.close("success")
    assert POINTS[name](run.directory) == [(step, 1 / step) for step in (1, 2, 3, 4)]
    assert second.run_id == first.run_id
    assert capfd.readouterr() == ("", "")
    assert [one for one in caplog.records if one.levelno >= logging.WARNING] == []
    assert children(before) == []


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_without_its_package_it_is_refused_before_training(name, monkeypatch):
    """And nothing is said where nobody asks for it."""
    monkeypatch.setattr(_process, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match=rf"logger '{name}' needs {name}: pip install '"):
        RunLoggers({name: {}})


THEIRS = """
import sys, time
from loragen.plugins.loggers._process import Recording

def record(hangs):
    print("Do you agree? ", end="")
    answer = sys.stdin.read()
    time.sleep(60 * hangs)

    def log(metrics, step):
        if step == 2:
            raise OSError(28, "No space left on device")

    return Recording(f"id-{len(answer)}", log, lambda status, reason: None)
"""


class TestProcess:
    @pytest.fixture
    def library(self, tmp_path, monkeypatch):
        (tmp_path / "their_tracker.py").write_text(THEIRS, encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        return _process.Library("Theirs", "their_tracker:record", {}, _process.NO_WARNING)

    def test_a_question_has_no_answer_and_an_error_has_a_reason(self, library, tmp_path, capfd):
        process = _process.RecordingProcess(library, {"hangs": 0}, tmp_path / "logs", 60)
        assert process.run_id == "id-0"
        process.log_metrics({"loss": 1.0}, 1)
        process.log_metrics({"loss": 1.0}, 2)
        with pytest.raises(LoragenError, match="No space left on device"):
            process.finish("success", 60)
        with pytest.raises(LoragenError, match="No space left on device"):
            process.log_metrics({"loss": 1.0}, 3)
        assert capfd.readouterr() == ("", "")

    def test_one_that_does_not_start_is_given_up(self, library, tmp_path):
        before = children()
        with pytest.raises(LoragenError, match="no answer within 2 s"):
            _process.RecordingProcess(library, {"hangs": 1}, tmp_path / "logs", 2)
        assert children(before) == []


class TestCsv:
    def test_a_resumed_run_drops_the_rows_of_later_steps(self, run):
        for value, steps, done in ((1.0, (1, 2, 3, 4), 0), (2.0, (3, 4, 5), 2)):
            plugin = create("logger", "csv", {})
            logger = plugin.open(replace(run, resume_step=done))
            for step in steps:
                logger.log_metrics({"train/loss": value}, step=step)
            logger.finalize("failed")
        assert csv_points(run.directory) == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]

    def test_a_killed_run_has_every_row(self, run):
        logger = create("logger", "csv", {}).open(run)
        logger.log_metrics({"train/loss": 1.0}, step=1)
        assert csv_points(run.directory) == [(1, 1.0)]


class TestWandB:
    def test_a_mode_of_the_environment_is_checked(self, monkeypatch):
        needs("wandb")
        monkeypatch.setenv("WANDB_MODE", "ofline")
        with pytest.raises(UsageError, match=r"WANDB_MODE.*ofline.*offline, online"):
            create("logger", "wandb", {})

    def test_online_without_a_key_is_offline_with_one_warning(self, run, caplog, monkeypatch):
        needs("wandb")
        monkeypatch.delenv("WANDB_API_KEY", raising=False)
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
        plugin = create("logger", "wandb", {"mode": "online"})
        plugin.open(run).log_metrics({"train/loss": 1.0}, step=1)
        plugin.close("success")
        (warning,) = (one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING)
        (directory,) = run.directory.glob("wandb_logs/wandb/offline-run-*")
        assert "W&B online did not start" in warning
        assert f"`wandb sync {directory}`" in warning
        assert wandb_points(run.directory) == [(1, 1.0)]


class TestMLflow:
    def test_it_keeps_the_configuration_and_how_the_run_ended(self, run, tmp_path):
        """In a store that the user names, relative to the working directory."""
        needs("mlflow")
        options = {
            "tracking_uri": "sqlite:///all.db",
            "experiment_name": "ours",
            "tags": {"a": "b"},
        }
        plugin = create("logger", "mlflow", options)
        plugin.open(run)
        plugin.close("interrupted")
        store = tmp_path / "home" / "all.db"
        assert rows(store, "SELECT run_uuid, name, status FROM runs") == [
            (plugin.run_id, "arc_lora_1", "KILLED")
        ]
        found = dict(rows(store, "SELECT key, value FROM params"))
        assert found == {"seed": "42", "data.root": "x"}
        assert ("ours",) in rows(store, "SELECT name FROM experiments")
        assert ("a", "b") in rows(store, "SELECT key, value FROM tags")

    def test_a_store_that_cannot_be_opened_costs_one_warning(self, run, caplog):
        needs("mlflow")
        loggers = RunLoggers({"mlflow": {"tracking_uri": "no-such-scheme://x"}})
        loggers.open(run)
        loggers.log_metrics({"train/loss": 1.0}, 1)
        loggers.close("success")
        (warning,) = (one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING)
        assert "logger 'mlflow' failed and is left out" in warning
        assert [one["step"] for one in read_metrics(run.directory / "metrics.jsonl")] == [1]

    def test_a_store_that_fails_midway_says_why(self, run, caplog):
        needs("mlflow")
        loggers = RunLoggers({"mlflow": {}})
        loggers.open(run)
        with closing(sqlite3.connect(run.directory / "mlflow_logs" / "mlflow.db")) as database:
            database.execute("DROP TABLE metrics")
            database.commit()
        loggers.log_metrics({"train/loss": 1.0}, 1)
        loggers.close("success")
        (warning,) = (one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING)
        assert "no such table: metrics" in warning


class Killing(Silent):
    """Ends the process of one logger at the third step of the training."""

    def __init__(self, package, before):
        self.package, self.before = package, before
        self.killed = 0

    def step(self, step):
        if step.step == 3:
            for child in children(self.before):
                if child.cmdline()[-1].endswith(f"_{self.package}"):
                    child.kill()
                    child.wait(60)
                    self.killed += 1


def test_all_loggers_at_once_and_none_is_lost_when_one_dies(lora_config, base, dataset, caplog):
    """One training, as many logs as loggers; the one that dies midway costs one warning."""
    names = ["csv", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"]
    needs(*names)
    config = lora_config({"loggers": {name: {} for name in names}})
    killing = Killing("trackio", children())
    run = train_adapter(config, Dataset(dataset(), "colors"), base, killing)
    assert killing.killed == 1
    (warning,) = (one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING)
    assert warning == (
        "logger 'trackio' failed and is left out: BrokenPipeError: its process has ended; "
        "training goes on"
    )
    assert run.manifest.status == "success"
    assert set(run.manifest.logger_run_ids) == {"mlflow", "swanlab", "trackio", "wandb"}
    entries = read_metrics(run.directory / "metrics.jsonl")
    wanted = [(e["step"], e["train/loss"]) for e in entries if "train/loss" in e]
    assert [step for step, _ in wanted] == list(range(1, 9))
    near = partial(pytest.approx, rel=1e-6)  # TensorBoard keeps float32
    for name in POINTS.keys() - {"trackio"}:
        found = POINTS[name](run.directory)
        assert [step for step, _ in found] == [step for step, _ in wanted], name
        assert [loss for _, loss in found] == near([loss for _, loss in wanted]), name
    assert swanlab_points(run.directory) >= 8
