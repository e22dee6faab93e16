import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psutil
import pytest

from loragen.core.errors import UsageError
from loragen.core.plugins import create, find
from loragen.core.protocols import RunInfo
from loragen.core.run.loggers import RunLoggers
from loragen.plugins.loggers import _process, swanlab
from loragen.testing import check_logger

PATIENT, SHORT = 60.0, 2.0
"""Deadlines in seconds: for what succeeds, also on a busy machine, and for what never does."""


KILLED = """
import os, sys, psutil
from pathlib import Path
from loragen.plugins.loggers._process import RecordingProcess
from loragen.plugins.loggers.swanlab import LIBRARY

arguments = {"mode": "offline", "log_dir": sys.argv[1]}
RecordingProcess(LIBRARY, arguments, Path(sys.argv[1]), 60)
print(psutil.Process().children()[0].pid, flush=True)
os._exit(1)
"""
"""Lightning, which the plugin needs to open a run, would take seconds."""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run directory, and a home and working directory with no SwanLab settings in them."""
    (tmp_path / "home").mkdir()
    (tmp_path / "run").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "home")
    return RunInfo(tmp_path / "run", "arc_lora_1", "loragen", {"seed": 42, "data": {"root": "x"}})


class Service(BaseHTTPRequestHandler):
    """Answers what SwanLab requests; none but the first `answers` requests."""

    answers = 1000
    status = 201
    seen: list[tuple[str, dict]]
    stopped: threading.Event

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.seen.append((f"{self.command} {self.path}", json.loads(body or b"{}")))
        if len(self.seen) > self.answers:
            self.stopped.wait(60)
            return
        reply = json.dumps(self.reply()).encode()
        self.send_response(self.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    do_GET = do_POST = do_PUT = answer  # noqa: N815  # http.server's names

    def reply(self):
        if self.path.endswith("/login/api_key"):
            user = {"name": "Us", "username": "us"}
            return {"sid": "s", "expiredAt": "2099-01-01T00:00:00.000Z", "userInfo": user}
        if "/experiment" in self.path or "/runs/" in self.path:
            return {"cuid": "e1", "slug": "e1", "name": "arc_lora_1"}
        project = {"cuid": "p1", "name": "proj", "path": "/us/proj", "group": {"username": "us"}}
        return {**project, "_count": {"experiments": 0}}

    def log_message(self, *_):
        pass


@pytest.fixture
def service(monkeypatch):
    """A SwanLab service on the loopback interface, with an invented key."""
    monkeypatch.setattr(swanlab, "ONLINE_SECONDS", PATIENT)
    handler = type("Running", (Service,), {"seen": [], "stopped": threading.Event()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads, server.block_on_close = True, False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("SWANLAB_API_KEY", "k" * 21)
    monkeypatch.setenv("SWANLAB_API_HOST", f"http://127.0.0.1:{server.server_port}")
    yield handler
    handler.stopped.set()
    server.shutdown()
    server.server_close()


def record(run, status="success", **options):
    """One short run, and the bytes of its file."""
    plugin = create("logger", "swanlab", options)
    logger = plugin.open(run)
    logger.log_metrics({"train/loss": 1.0}, step=1)
    plugin.close(status)
    files = list(run.directory.glob(f"swanlab_logs/*/run-{plugin.run_id}.swanlab"))
    return plugin, b"".join(file.read_bytes() for file in files)


def run_directories(run):
    return [path for path in (run.directory / "swanlab_logs").iterdir() if path.is_dir()]


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize(
    "name, options",
    [("tensorboard", {}), ("swanlab", {}), ("swanlab", {"mode": "disabled"})],
)
def test_contract(name, options, tmp_path, run):
    check_logger(find("logger", name), tmp_path / "run", **options)


class TestTensorBoard:
    def test_event_files_lie_straight_in_the_directory(self, run):
        plugin = create("logger", "tensorboard", {})
        logger = plugin.open(run)
        logger.log_metrics({"train/loss": 1.0}, step=1)
        logger.finalize("success")
        names = [path.name for path in (run.directory / "tensorboard_logs").iterdir()]
        assert [name for name in names if name.startswith("events.out.tfevents")]
        assert {path.name for path in run.directory.iterdir()} == {"tensorboard_logs"}

    def test_a_resumed_run_replaces_later_points(self, run):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        directory = run.directory / "tensorboard_logs"
        for value, steps, done in ((1.0, (1, 2, 3, 4), 0), (2.0, (3, 4, 5), 2)):
            plugin = create("logger", "tensorboard", {})
            logger = plugin.open(replace(run, resume_step=done))
            for step in steps:
                logger.log_metrics({"train/loss": value}, step=step)
            logger.finalize("failed")
            if not done:  # an hour ago: files are ordered by the time in their names
                (file,) = directory.glob("events*")
                head, _, tail = file.name.removeprefix("events.out.tfevents.").partition(".")
                file.rename(directory / f"events.out.tfevents.{int(head) - 3600}.{tail}")
        events = EventAccumulator(str(directory)).Reload()
        points = [(event.step, event.value) for event in events.Scalars("train/loss")]
        assert points == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]

    def test_on_a_full_disk_it_is_left_out_with_one_warning(self, run, caplog, capfd, monkeypatch):
        from tensorboard.summary.writer.record_writer import RecordWriter

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
        loggers = RunLoggers({"tensorboard": {}})
        loggers.open(run)
        monkeypatch.setattr(RecordWriter, "write", full)
        for step in range(1, 2000):
            loggers.log_metrics({"train/loss": 1.0}, step)
            if warnings_of(caplog):
                break
        loggers.log_metrics({"train/loss": 1.0}, 2000)
        loggers.close("success")
        (warning,) = warnings_of(caplog)
        assert "tensorboard" in warning
        assert "No space left on device" in warning
        assert capfd.readouterr() == ("", "")


class TestSwanLab:
    def test_it_is_offline_by_default_and_leaves_the_process_alone(self, run, capfd, caplog):
        handlers = signal.getsignal(signal.SIGINT), sys.excepthook, sys.stdout, dict(os.environ)
        plugin, content = record(run)
        (directory,) = run_directories(run)
        assert directory.name.endswith(plugin.run_id)
        assert b"train/loss" in content
        now = signal.getsignal(signal.SIGINT), sys.excepthook, sys.stdout, dict(os.environ)
        assert now == handlers
        assert "swanlab" not in sys.modules
        assert capfd.readouterr() == ("", "")
        assert [record for record in caplog.records if record.name.startswith("loragen")] == []
        plugin.close("success")  # again: nothing happens

    def test_it_captures_neither_packages_nor_git(self, run):
        record(run)
        (directory,) = run_directories(run)
        assert not (directory / "files" / "requirements.txt").exists()
        metadata = json.loads((directory / "files" / "swanlab-metadata.json").read_text())
        assert metadata["git"] is None

    def test_the_environment_gives_a_mode_where_the_config_does_not(self, run, monkeypatch):
        monkeypatch.setenv("SWANLAB_MODE", "disabled")
        plugin, _ = record(run)
        assert plugin.run_id is None
        assert run_directories(run) == []
        plugin, _ = record(run, mode="offline")
        assert plugin.run_id

    def test_a_mode_of_the_environment_is_checked(self, monkeypatch):
        monkeypatch.setenv("SWANLAB_MODE", "ofline")
        with pytest.raises(UsageError, match=r"SWANLAB_MODE.*ofline.*online, cloud"):
            create("logger", "swanlab", {})

    @pytest.mark.parametrize(
        ("variables", "options", "expected"),
        [
            (False, {}, ("loragen", "arc_lora_1")),
            (True, {}, ("their-project", "their-team", "their-run")),
            (
                True,
                {"project": "our-project", "workspace": "our-team", "experiment_name": "our-run"},
                ("our-project", "our-team", "our-run"),
            ),
        ],
    )
    def test_names(self, run, monkeypatch, variables, options, expected):
        if variables:
            monkeypatch.setenv("SWANLAB_PROJECT", "their-project")
            monkeypatch.setenv("SWANLAB_WORKSPACE", "their-team")
            monkeypatch.setenv("SWANLAB_EXPERIMENT", "their-run")
        _, content = record(run, **options)
        assert [name for name in expected if name.encode() not in content] == []

    @pytest.mark.parametrize(
        "status, state",
        [("success", "FINISHED"), ("failed", "CRASHED"), ("interrupted", "ABORTED")],
    )
    def test_online_everything_is_uploaded(self, run, service, caplog, status, state):
        caplog.set_level(logging.INFO, logger="loragen")
        plugin, _ = record(run, status, mode="online", project="proj", tags=["tiny"])
        messages = [r.getMessage() for r in caplog.records if r.name.startswith("loragen")]
        assert messages == [f"SwanLab run: {os.environ['SWANLAB_API_HOST']}/@us/proj/runs/e1"]
        sent = dict(service.seen)
        assert sent["POST /api/project/us/proj/experiment"]["cuid"] == plugin.run_id
        assert "tiny" in json.dumps(sent["POST /api/project/us/proj/experiment"]["labels"])
        assert "train/loss" in json.dumps([b for path, b in service.seen if "metrics" in path])
        assert sent["PUT /api/project/us/proj/runs/e1/state"]["state"] == state

    def test_the_run_of_a_killed_training_has_crashed(self, run):
        command = [sys.executable, "-c", KILLED, str(run.directory)]
        pid = int(subprocess.run(command, capture_output=True, text=True).stdout)
        with suppress(psutil.NoSuchProcess):
            psutil.Process(pid).wait(60)
        (file,) = run.directory.glob("*/*.swanlab")
        assert b"the training process has ended" in file.read_bytes()

    def test_a_process_that_does_not_respond_never_blocks_training(self, run, monkeypatch):
        monkeypatch.setattr(_process, "UPLOAD_SECONDS", SHORT)
        plugin, others = create("logger", "swanlab", {}), psutil.Process().children()
        logger = plugin.open(run)
        (child,) = set(psutil.Process().children()) - set(others)
        child.suspend()
        with pytest.raises(OSError, match="respond"):
            for step in range(20_000):
                logger.log_metrics({"train/loss": 1.0, "train/lr": 1.0}, step)
        with suppress(OSError):
            plugin.close("success")
        assert not child.is_running()

    def test_a_signal_to_every_process_leaves_the_end_to_the_parent(self, run):
        plugin, others = create("logger", "swanlab", {}), psutil.Process().children()
        logger = plugin.open(run)
        (child,) = set(psutil.Process().children()) - set(others)
        child.terminate()
        logger.log_metrics({"train/loss": 1.0}, step=1)
        plugin.close("interrupted")
        (file,) = run.directory.glob("swanlab_logs/*/*.swanlab")
        assert b"the training process has ended" not in file.read_bytes()
        assert b"interrupted" in file.read_bytes()

    def test_a_resumed_run_keeps_its_id(self, run, service):
        resumed = replace(run, resume_id="run12345", resume_step=1)
        assert record(resumed)[0].run_id == "run12345"
        record(resumed, mode="online")
        assert dict(service.seen)["POST /api/project/us/proj/experiment"]["cuid"] == "run12345"

    def test_a_run_beside_an_open_one_is_another_run(self, run):
        first = create("logger", "swanlab", {})
        first.open(run)
        second, _ = record(run)
        assert second.run_id != first.run_id
        first.close("failed")

    def test_local_without_the_dashboard_is_offline(self, run, caplog, monkeypatch):
        monkeypatch.setattr(swanlab, "find_spec", lambda _: None)
        plugin, _ = record(run, mode="local")
        (warning,) = warnings_of(caplog)
        assert "swanlab[dashboard]" in warning
        assert run_directories(run)[0].name.endswith(plugin.run_id)

    @pytest.mark.parametrize(
        ("problem", "reason"),
        [
            ("no key", "API key"),
            ("a wrong key", "API key"),
            ("nobody listens", "no answer within 2 s"),
            ("no answer", "no answer within 2 s"),
            ("no second answer", "no answer within 2 s"),
        ],
    )
    def test_online_without_the_service_is_offline(
        self, run, service, caplog, capfd, monkeypatch, problem, reason
    ):
        """With one warning that says why, and nothing else on the disk."""
        if "no answer" in reason:
            monkeypatch.setattr(swanlab, "ONLINE_SECONDS", SHORT)
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            if problem == "no key":
                monkeypatch.delenv("SWANLAB_API_KEY")
            elif problem == "nobody listens":
                address = f"http://127.0.0.1:{bound.getsockname()[1]}"
                monkeypatch.setenv("SWANLAB_API_HOST", address)
            service.status = 401 if problem == "a wrong key" else 201
            service.answers = {"no answer": 0, "no second answer": 1}.get(problem, 1000)
            plugin, content = record(run, mode="online")
        (warning,) = warnings_of(caplog)
        assert reason in warning
        (directory,) = run_directories(run)
        assert f"`swanlab sync --id {plugin.run_id} {directory}`" in warning
        assert b"train/loss" in content
        assert capfd.readouterr() == ("", "")

    def test_a_run_that_cannot_be_written_is_left_out(self, run, caplog, capfd):
        (run.directory / "swanlab_logs").write_text("in the way")
        loggers = RunLoggers({"swanlab": {}})
        loggers.open(run)
        loggers.close("success")
        (warning,) = warnings_of(caplog)
        assert "'swanlab'" in warning
        assert "FileExistsError" in warning
        assert capfd.readouterr() == ("", "")

    def test_a_network_that_fails_later_does_not_hold_up_the_end(
        self, run, service, caplog, capfd, monkeypatch
    ):
        monkeypatch.setattr(_process, "UPLOAD_SECONDS", SHORT)
        loggers = RunLoggers({"swanlab": {"mode": "online"}})
        loggers.open(run)
        service.answers = 0
        for step in range(1, 21):
            loggers.log_metrics({"train/loss": 1.0}, step)
        started = time.monotonic()
        loggers.close("success")
        assert time.monotonic() - started < PATIENT
        (warning,) = warnings_of(caplog)
        (directory,) = run_directories(run)
        command = f"swanlab sync --id {directory.name.rpartition('-')[2]} {directory}"
        assert f"`{command}`" in warning
        assert capfd.readouterr() == ("", "")
