import json
import logging
import os
import socket
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from swanlab.sdk.internal.core_python import client
from swanlab.sdk.internal.settings import set_global_settings

from loragen.core.errors import UsageError
from loragen.core.plugins import create, find
from loragen.core.protocols import RunInfo
from loragen.core.run.loggers import RunLoggers
from loragen.plugins.loggers import _swanlab_run
from loragen.testing import check_logger

TINY_LIMIT = 1.0
"""Seconds that the tests grant the service in place of ten."""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run directory, and a home and working directory with no SwanLab settings in them."""
    (tmp_path / "home").mkdir()
    (tmp_path / "run").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "home")
    return RunInfo(tmp_path / "run", "arc_lora_1", "loragen", {"seed": 42, "data": {"root": "x"}})


class Service(BaseHTTPRequestHandler):
    """Answers what SwanLab asks when a run starts, up to `silent_after` requests."""

    silent_after = 1000
    status = 201
    seen: list[tuple[str, dict]]

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.seen.append((f"{self.command} {self.path}", json.loads(body or b"{}")))
        if len(self.seen) > self.silent_after:
            time.sleep(4 * TINY_LIMIT)
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


class TricklingService(Service):
    """Sends a byte now and then, each in time for a read's own limit."""

    def answer(self):
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        try:
            for _ in range(int(4 * TINY_LIMIT / 0.1)):
                self.wfile.write(b" ")
                time.sleep(0.1)
        except OSError:
            pass  # the client has gone, as it should

    do_GET = do_POST = do_PUT = answer  # noqa: N815


@pytest.fixture
def serve(monkeypatch):
    """Points SwanLab at a loopback service with a made-up key."""
    monkeypatch.setattr(_swanlab_run, "ONLINE_SECONDS", TINY_LIMIT)
    servers = []

    def start(handler=Service, **attributes):
        service = type("Service", (handler,), {"seen": [], **attributes})
        server = ThreadingHTTPServer(("127.0.0.1", 0), service)
        server.daemon_threads = True
        server.block_on_close = False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        point_at(server.server_port)
        return service

    def point_at(port):
        monkeypatch.setenv("SWANLAB_API_KEY", "k" * 21)
        monkeypatch.setenv("SWANLAB_API_HOST", f"http://127.0.0.1:{port}")

    start.point_at = point_at
    yield start
    set_global_settings(None)  # or the next test would be logged in
    if client.exists():
        client.reset()
    for server in servers:
        server.shutdown()
        server.server_close()


def record(run, status="success", **options):
    """One short run; returns the plugin and how long its start took (seconds)."""
    plugin = create("logger", "swanlab", options)
    started = time.monotonic()
    logger = plugin.open(run)
    seconds = time.monotonic() - started
    logger.log_metrics({"train/loss": 1.0}, step=1)
    plugin.close(status)
    return plugin, seconds


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


def test_tensorboard_writes_event_files_straight_into_its_directory(run):
    plugin = create("logger", "tensorboard", {})
    logger = plugin.open(run)
    logger.log_metrics({"train/loss": 1.0}, step=1)
    assert plugin.run_id is None
    plugin.close("success")
    names = [path.name for path in (run.directory / "tensorboard_logs").iterdir()]
    assert [name for name in names if name.startswith("events.out.tfevents")]
    assert {path.name for path in run.directory.iterdir()} == {"tensorboard_logs"}


def test_tensorboard_hides_what_a_continued_run_does_again(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for value, steps, done in ((1.0, (1, 2, 3, 4), 0), (2.0, (3, 4, 5), 2)):
        plugin = create("logger", "tensorboard", {})
        logger = plugin.open(replace(run, resume_step=done))
        for step in steps:
            logger.log_metrics({"train/loss": value}, step=step)
        plugin.close("interrupted")
        if not done:
            time.sleep(1.1)  # the files are ordered by the second in their names
    events = EventAccumulator(str(run.directory / "tensorboard_logs")).Reload()
    points = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert points == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]


def test_tensorboard_on_a_full_disk_is_left_out_with_one_warning(run, caplog, capfd, monkeypatch):
    from tensorboard.summary.writer.record_writer import RecordWriter

    def full(*_):
        raise OSError(28, "No space left on device")

    loggers = RunLoggers({"tensorboard": {}})
    loggers.open(run)
    monkeypatch.setattr(RecordWriter, "write", full)
    for step in range(1, 21):
        loggers.log_metrics({"train/loss": 1.0}, step)
        time.sleep(0.02)
    loggers.close("success")
    (warning,) = warnings_of(caplog)
    assert warning.startswith("logger 'tensorboard' failed and is left out: ")
    assert "No space left on device" in warning
    assert capfd.readouterr() == ("", "")


def test_swanlab_is_offline_by_default_and_silent(run, capfd, caplog):
    plugin, _ = record(run)
    (directory,) = run_directories(run)
    assert directory.name.endswith(plugin.run_id)
    assert (directory / f"run-{plugin.run_id}.swanlab").stat().st_size > 0
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.name.startswith("loragen")] == []


def test_swanlab_captures_neither_terminal_nor_packages_nor_git(run):
    record(run)
    (directory,) = run_directories(run)
    assert not (directory / "files" / "requirements.txt").exists()
    metadata = json.loads((directory / "files" / "swanlab-metadata.json").read_text())
    assert metadata["git"] is None
    assert type(sys.stdout).__module__.split(".")[0] != "swanlab"


def test_swanlab_mode_comes_from_the_environment_unless_given(run, monkeypatch):
    monkeypatch.setenv("SWANLAB_MODE", "disabled")
    plugin, _ = record(run)
    assert plugin.run_id is None
    assert run_directories(run) == []
    plugin, _ = record(run, mode="offline")
    assert plugin.run_id


def test_swanlab_mode_of_the_environment_is_checked(run, monkeypatch):
    monkeypatch.setenv("SWANLAB_MODE", "ofline")
    with pytest.raises(UsageError, match="SWANLAB_MODE is 'ofline'; it may be online, cloud"):
        create("logger", "swanlab", {})


@pytest.mark.parametrize("given", [False, True])
def test_swanlab_variables_fill_what_the_config_leaves_open(run, monkeypatch, given):
    monkeypatch.setenv("SWANLAB_PROJECT", "their-project")
    monkeypatch.setenv("SWANLAB_WORKSPACE", "their-team")
    monkeypatch.setenv("SWANLAB_EXPERIMENT", "their-run")
    options = {"project": "p", "workspace": "w", "experiment_name": "e"} if given else {}
    plugin = create("logger", "swanlab", options)
    settings = plugin.open(run).experiment._ctx.config.settings
    plugin.close("success")
    found = (settings.project.name, settings.project.workspace, settings.experiment.name)
    assert found == (("p", "w", "e") if given else ("their-project", "their-team", "their-run"))
    assert os.environ["SWANLAB_PROJECT"] == "their-project"


def test_swanlab_names_default_to_the_run(run):
    plugin = create("logger", "swanlab", {})
    settings = plugin.open(run).experiment._ctx.config.settings
    plugin.close("success")
    assert (settings.project.name, settings.experiment.name) == ("loragen", "arc_lora_1")


@pytest.mark.parametrize(
    "status, state", [("success", "success"), ("failed", "crashed"), ("interrupted", "aborted")]
)
def test_swanlab_run_ends_with_the_status(run, status, state):
    plugin = create("logger", "swanlab", {})
    experiment = plugin.open(run).experiment
    plugin.close(status)
    assert experiment._state == state
    plugin.close(status)  # again: nothing happens


def test_swanlab_leaves_ctrl_c_to_the_caller(run):
    import signal

    handler = signal.getsignal(signal.SIGINT)
    plugin = create("logger", "swanlab", {})
    plugin.open(run)
    assert signal.getsignal(signal.SIGINT) is handler
    plugin.close("interrupted")
    assert signal.getsignal(signal.SIGINT) is handler


def test_swanlab_resumes_under_the_same_id(run, tmp_path):
    plugin, _ = record(run)
    resumed, _ = record(replace(run, resume_id=plugin.run_id, resume_step=1))
    assert resumed.run_id == plugin.run_id


def test_swanlab_online_goes_on_with_the_run_of_that_id(run, serve):
    service = serve()
    record(replace(run, resume_id="run12345", resume_step=1), mode="online")
    sent = dict(service.seen)["POST /api/project/us/proj/experiment"]
    assert sent["cuid"] == "run12345"


def test_swanlab_does_not_go_on_with_a_run_that_was_left_open(run):
    first = create("logger", "swanlab", {})
    first.open(run)
    second, _ = record(run)
    assert second.run_id != first.run_id
    first.close("failed")


def test_swanlab_local_without_the_dashboard_is_offline_with_one_warning(run, caplog, monkeypatch):
    monkeypatch.setattr("loragen.plugins.loggers.swanlab.find_spec", lambda _: None)
    plugin, _ = record(run, mode="local")
    (warning,) = warnings_of(caplog)
    assert "swanlab[dashboard]" in warning
    assert run_directories(run)[0].name.endswith(plugin.run_id)


def check_fell_back(run, caplog, capfd, reason):
    """Offline, with one warning that says why, within the limit, and nothing half-made left."""
    plugin, seconds = record(run, mode="online")
    (warning,) = warnings_of(caplog)
    assert reason in warning
    assert seconds < TINY_LIMIT + 1.0
    (directory,) = run_directories(run)
    assert f"recording offline, `swanlab sync --id {plugin.run_id} {directory}`" in warning
    assert capfd.readouterr() == ("", "")


def test_swanlab_online_without_a_key(run, caplog, capfd):
    check_fell_back(run, caplog, capfd, "no API key was provided")


def test_swanlab_online_where_nobody_listens(run, caplog, capfd, serve):
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        serve.point_at(bound.getsockname()[1])
        check_fell_back(run, caplog, capfd, "/api/login/api_key: ConnectionError")


def test_swanlab_online_where_the_host_is_silent(run, caplog, capfd, serve):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        serve.point_at(silent.getsockname()[1])
        check_fell_back(run, caplog, capfd, "no answer within 1 s")


@pytest.mark.parametrize("answered", [0, 1, 2])
def test_swanlab_online_where_the_service_stops_answering(run, caplog, capfd, serve, answered):
    service = serve(silent_after=answered)
    check_fell_back(run, caplog, capfd, "no answer within 1 s")
    assert len(service.seen) == answered + 1


def test_swanlab_online_where_the_answer_trickles(run, caplog, capfd, serve):
    serve(TricklingService)
    check_fell_back(run, caplog, capfd, "no answer within 1 s")


def test_swanlab_online_with_a_wrong_key(run, caplog, capfd, serve):
    serve(status=401)
    check_fell_back(run, caplog, capfd, "API key")


def whole_run(run, mode, between=None, status="success"):
    """Twenty steps as training would log them; `between(step)` before each. Gives the seconds."""
    loggers = RunLoggers({"swanlab": {"mode": mode}})
    started = time.monotonic()
    loggers.open(run)
    for step in range(1, 21):
        if between is not None:
            between(step)
        loggers.log_metrics({"train/loss": 1.0}, step)
    loggers.close(status)
    return time.monotonic() - started


@pytest.mark.parametrize("mode", ["offline", "local", "online"])
def test_swanlab_that_cannot_write_is_left_out_with_one_warning(
    run, caplog, capfd, mode, monkeypatch
):
    monkeypatch.setattr("loragen.plugins.loggers.swanlab.find_spec", lambda _: True)
    (run.directory / "swanlab_logs").write_text("in the way")
    whole_run(run, mode)
    (warning,) = warnings_of(caplog)
    assert warning.startswith("logger 'swanlab' failed and is left out: FileExistsError")
    assert capfd.readouterr() == ("", "")


def test_swanlab_on_a_full_disk_complains_once(run, caplog, capfd, monkeypatch):
    from swanlab.sdk.internal.core_python.store import DataStoreWriter

    def full(*_):
        raise OSError(28, "No space left on device")

    def between(step):
        if step == 5:
            monkeypatch.setattr(DataStoreWriter, "write", full)
        time.sleep(0.1)  # so that SwanLab writes several batches

    whole_run(run, "offline", between)
    (warning,) = warnings_of(caplog)
    assert "No space left on device (said once); training goes on" in warning
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("status", ["success", "interrupted"])
def test_swanlab_online_whose_network_goes_away_ends_all_the_same(
    run, caplog, capfd, serve, monkeypatch, status
):
    """SwanLab itself would wait for the network for ever."""
    monkeypatch.setattr(_swanlab_run, "UPLOAD_SECONDS", TINY_LIMIT)
    service = serve()

    def between(step):
        if step == 5:
            service.silent_after = 0

    assert whole_run(run, "online", between, status) < 3 * TINY_LIMIT
    (warning,) = warnings_of(caplog)
    (directory,) = run_directories(run)
    command = f"swanlab sync --id {directory.name.rpartition('-')[2]} {directory}"
    assert f"`{command}` uploads what is missing" in warning
    deadline = time.monotonic() + 30  # a request that is under way may take its own time
    while any(thread.name == "SwanLab·Transport" for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "the upload goes on for ever in the background"
        time.sleep(0.1)
    assert capfd.readouterr() == ("", "")


def test_swanlab_speaks_for_itself_again_after_the_run(run):
    import swanlab

    record(run)
    assert (swanlab.pkg.console.warning, swanlab.pkg.console.error) == _swanlab_run.THEIR_WORDS


def test_swanlab_online_after_a_failed_start_in_the_same_process(run, caplog, serve):
    """And the whole way: metrics are uploaded and the run ends with its state."""
    service = serve(silent_after=0)
    record(run, mode="online")
    service.silent_after = 1000
    service.seen.clear()
    caplog.clear()
    caplog.set_level(logging.INFO, logger="loragen")
    plugin, _ = record(run, "failed", mode="online", project="proj", tags=["tiny"])
    messages = [r.getMessage() for r in caplog.records if r.name.startswith("loragen")]
    assert messages == [f"SwanLab run: {os.environ['SWANLAB_API_HOST']}/@us/proj/runs/e1"]
    sent = dict(service.seen)
    assert sent["POST /api/project/us/proj/experiment"]["cuid"] == plugin.run_id
    assert "tiny" in json.dumps(sent["POST /api/project/us/proj/experiment"]["labels"])
    assert "train/loss" in json.dumps([body for path, body in service.seen if "metrics" in path])
    assert sent["PUT /api/project/us/proj/runs/e1/state"]["state"] == "CRASHED"


def test_the_bound_on_requests_is_gone_after_the_start():
    from requests.adapters import HTTPAdapter

    send = HTTPAdapter.send
    with pytest.raises(RuntimeError), _swanlab_run.requests_within(1.0, []):
        assert HTTPAdapter.send is not send
        raise RuntimeError
    assert HTTPAdapter.send is send
