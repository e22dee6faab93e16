import json
import logging
from math import inf, isnan, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loragen.core.data.dataset import Dataset
from loragen.core.errors import PluginError, UsageError
from loragen.core.lora.train import train_adapter
from loragen.core.progress import Silent
from loragen.core.protocols import RunInfo
from loragen.core.run.directory import LoraManifest, read_manifest
from loragen.core.run.loggers import MetricsLog, RunLoggers
from loragen.core.run.metrics import read_metrics


@pytest.fixture
def file(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_one_object_a_line_at_once(file):
    log = MetricsLog(file)
    log.log_metrics({"train/loss": 0.5, "train/准确率": 1.0}, step=1)
    assert json.loads(file.read_bytes()) == {"step": 1, "train/loss": 0.5, "train/准确率": 1.0}
    log.log_metrics({"val/loss": 2}, step=1)
    assert file.read_bytes().count(b"\n") == 2
    assert read_metrics(file)[1] == {"step": 1, "val/loss": 2}


def test_what_is_not_finite_is_null_and_nan_again(file):
    MetricsLog(file).log_metrics({"a": nan, "b": inf, "c": 1.0}, step=1)
    assert json.loads(file.read_bytes()) == {"step": 1, "a": None, "b": None, "c": 1.0}
    (entry,) = read_metrics(file)
    assert isnan(entry["a"])
    assert isnan(entry["b"])


def test_a_new_run_has_no_file_before_its_first_step(file):
    MetricsLog(file)
    MetricsLog(file, resume_step=4)
    assert not file.exists()


STEPS = st.lists(st.integers(1, 20), max_size=12)
TORN = st.one_of(st.just(b""), st.binary(max_size=40), st.integers(1, 25))


@given(STEPS, TORN, st.integers(1, 20))
def test_resuming_keeps_exactly_the_entries_up_to_the_step(tmp_path_factory, steps, torn, resume):
    """Whatever the killed run left at the end: a part of a line, another program's bytes."""
    file = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    log = MetricsLog(file)
    for index, step in enumerate(steps):
        log.log_metrics({"index": index}, step)
    whole = b'{"step": 1, "train/loss": 0.25}'
    tail = whole[:torn] if isinstance(torn, int) else torn.replace(b"\n", b"")
    with file.open("ab") as stream:
        stream.write(tail)
    kept = [{"step": s, "index": i} for i, s in enumerate(steps) if s <= resume]
    resumed = MetricsLog(file, resume)
    assert read_metrics(file) == kept
    resumed.log_metrics({"index": -1}, resume + 1)
    assert read_metrics(file) == [*kept, {"step": resume + 1, "index": -1}]
    assert [path.name for path in file.parent.iterdir()] == ["metrics.jsonl"]


def test_a_last_line_that_only_lost_its_end_of_line_is_an_entry(file):
    file.write_bytes(b'{"step": 1, "a": 1}\n{"step": 2, "a": 2}')
    MetricsLog(file, 2).log_metrics({"a": 3}, 3)
    assert [entry["step"] for entry in read_metrics(file)] == [1, 2, 3]


HOOKS = """
from loragen import hookimpl

@hookimpl
def loragen_loggers():
    return {"fake": "fake_logger:Fake", "other": "fake_logger:Fake"}
"""
FAKE = '''
"""Fails where its options say so, and tells what was called."""
from lightning.pytorch.loggers import Logger
from pydantic import BaseModel, Field
from loragen.core.errors import UsageError

CALLED = []

class Lightning(Logger):
    name, version = "fake", None

    def __init__(self, act):
        self.act = act

    def __getattribute__(self, name):  # whatever Lightning calls
        if name in ("log_hyperparams", "log_graph", "save", "after_save_checkpoint"):
            raise OSError("Lightning reached " + name)
        return super().__getattribute__(name)

    def log_hyperparams(self, params): ...

    def log_metrics(self, metrics, step=None):
        self.act("log_metrics", dict(metrics), step)
        metrics.clear()

    def finalize(self, status):
        self.act("finalize", status)

class Fake:
    class Config(BaseModel, extra="forbid"):
        fails: str = Field("", description="The method.")
        mistake: str = Field("", description="The method.")

    def __init__(self, config):
        self.config = config
        self.act("init")

    def act(self, method, *what):
        CALLED.append((method, *what))
        if method == self.config.fails:
            raise OSError(28, "No space\\nleft")
        if method == self.config.mistake:
            raise UsageError("FAKE_MODE is wrong")

    def open(self, run):
        self.act("open", run)
        return Lightning(self.act)

    @property
    def run_id(self):
        self.act("run_id")
        return "id-1"

    def close(self, status):
        self.act("close", status)
'''
METHODS = ("init", "open", "run_id", "log_metrics", "finalize", "close")


@pytest.fixture
def called(install):
    """What the plugins `fake` and `other` were called with."""
    install("fake-loggers", HOOKS, fake_logger=FAKE)
    import fake_logger

    return fake_logger.CALLED


@pytest.fixture
def info(tmp_path):
    (tmp_path / "run").mkdir()
    return RunInfo(tmp_path / "run", "colors_lora_1", "loragen-lora", {"seed": 42})


def whole_run(loggers, info, status="success"):
    loggers.open(info)
    for step in (1, 2, 3):
        loggers.log_metrics({"train/loss": 1.0 / step}, step)
    loggers.close(status)
    loggers.close(status)  # again: nothing happens


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    "status, end", [("success",) * 2, ("failed",) * 2, ("interrupted", "failed")]
)
def test_a_run(called, info, caplog, status, end):
    loggers = RunLoggers({"fake": {}})
    whole_run(loggers, info, status)
    assert [call for call in called if call[0] != "run_id"] == [
        ("init",),
        ("open", info),
        *(("log_metrics", {"train/loss": 1.0 / step}, step) for step in (1, 2, 3)),
        ("finalize", end),
        ("close", status),
    ]
    assert loggers.run_ids == {"fake": "id-1"}
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("method", METHODS)
def test_one_that_fails_costs_one_warning_and_is_not_called_again(called, info, caplog, method):
    whole_run(RunLoggers({"fake": {"fails": method}}), info)
    assert warnings_of(caplog) == [
        "logger 'fake' failed and is left out: OSError: [Errno 28] No space left; training goes on"
    ]
    assert called[-1][0] == method
    assert [entry["step"] for entry in read_metrics(info.directory / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.parametrize("method", METHODS)
def test_the_others_go_on_with_all_of_it(called, info, method):
    """One gets its own copy of the metrics, and the failure of the first is not theirs."""
    whole_run(RunLoggers({"fake": {"fails": method}, "other": {}}), info)
    logged = [call for call in called if call[0] == "log_metrics"]
    assert logged[-1] == ("log_metrics", {"train/loss": 1 / 3}, 3)
    assert called[-1] == ("close", "success")


@pytest.mark.parametrize("method", ["init", "open"])
def test_a_mistake_of_the_user_stops_before_training(called, info, method):
    with pytest.raises(UsageError, match="FAKE_MODE is wrong"):
        RunLoggers({"fake": {"mistake": method}}).open(info)


def test_what_was_open_by_then_is_closed(called, info):
    loggers = RunLoggers({"fake": {}, "other": {"mistake": "open"}})
    with pytest.raises(UsageError):
        loggers.open(info)
    called.clear()
    loggers.close("failed")
    assert called == [("finalize", "failed"), ("close", "failed")]


def test_an_unknown_logger_stops_before_training():
    with pytest.raises(PluginError, match="unknown logger 'tensorbord'"):
        RunLoggers({"tensorbord": {}})


def test_later_not_even_a_usage_error_stops(called, info, caplog):
    whole_run(RunLoggers({"fake": {"mistake": "log_metrics"}}), info)
    (warning,) = warnings_of(caplog)
    assert warning == "logger 'fake' failed and is left out: FAKE_MODE is wrong; training goes on"


def test_a_continued_run(called, info):
    whole_run(RunLoggers({}), info)
    whole_run(RunLoggers({"fake": {}, "other": {}}, {"fake": "id-0"}, resume_step=2), info)
    (fake, other) = [call[1] for call in called if call[0] == "open"]
    assert (fake.resume_id, fake.resume_step) == ("id-0", 2)
    assert (other.resume_id, other.resume_step) == (None, 2)
    steps = [entry["step"] for entry in read_metrics(info.directory / "metrics.jsonl")]
    assert steps == [1, 2, 1, 2, 3]


def test_the_local_log_fails_like_any_other(called, info, caplog):
    (info.directory / "metrics.jsonl").mkdir()
    whole_run(RunLoggers({"fake": {}}, resume_step=1), info)
    (warning,) = warnings_of(caplog)
    assert warning.startswith("logger 'metrics.jsonl' failed and is left out: ")
    assert called[-1] == ("close", "success")


@pytest.mark.parametrize("method", [*METHODS, ""])
def test_training_goes_on(called, train_lora, caplog, method):
    """Through Lightning: it is never given the loggers, so that nothing else of them is called."""
    run = train_lora({"loggers": {"fake": {"fails": method}}, "data.val_ratio": 0.25})
    assert read_manifest(run.directory, LoraManifest).status == "success"
    entries = read_metrics(run.directory / "metrics.jsonl")
    assert [e["step"] for e in entries if "train/loss" in e] == list(range(1, 9))
    assert [e["step"] for e in entries if "val/loss" in e] == [8]
    assert len(warnings_of(caplog)) == (method in METHODS)
    identified = method not in ("init", "open", "run_id")
    assert run.manifest.logger_run_ids == ({"fake": "id-1"} if identified else {})


class Stopping(Silent):
    """Ends the training at its third step."""

    def __init__(self, error):
        self.error = error

    def step(self, step):
        if step.step == 3:
            raise self.error


@pytest.mark.parametrize(
    "error, status, end",
    [
        (RuntimeError("nan"), "failed", "failed"),
        (KeyboardInterrupt(), "interrupted", "failed"),
    ],
)
def test_they_hear_how_training_ended(called, lora_config, base, dataset, error, status, end):
    with pytest.raises(type(error)):
        train_adapter(
            lora_config({"loggers": {"fake": {}}}),
            Dataset(dataset(), "colors"),
            base,
            Stopping(error),
        )
    assert called[-2:] == [("finalize", end), ("close", status)]


def test_they_hear_it_of_a_generator_too(called, gen_config):
    from loragen.core.learning.train import train

    run = train(gen_config({"loggers": {"fake": {}}}), Silent())
    assert called[-2:] == [("finalize", "success"), ("close", "success")]
    entries = read_metrics(run.directory / "metrics.jsonl")
    steps = [entry["step"] for entry in entries if "train/loss" in entry]
    assert steps == list(range(1, run.manifest.steps + 1))
    assert run.manifest.logger_run_ids == {"fake": "id-1"}
