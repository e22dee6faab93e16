"""Starting and finishing a SwanLab run: everything that needs swanlab and lightning imported.

Apart from `swanlab.py` so that validating a configuration imports neither.
"""

import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from types import SimpleNamespace
from typing import Any

import swanlab
from requests import PreparedRequest, RequestException, Response
from requests.adapters import HTTPAdapter
from requests.exceptions import Timeout
from swanlab.integration.pytorch_lightning import SwanLabLogger
from swanlab.proto.swanlab.grpc.core.v1.core_pb2 import GetOperationStatsResponse
from swanlab.sdk.internal.core_python import client
from urllib3.util import Retry

from loragen import LoragenError
from loragen.core.protocols import Status

ONLINE_SECONDS = 10.0
"""How long the service may take, in all, until a run is open there."""

UPLOAD_SECONDS = 60.0
"""How long the end of a run may wait for what is not uploaded yet. SwanLab would wait for ever."""

# SwanLab reads the first two as whole groups of settings and refuses to start; all three have
# reached it as arguments.
HIDDEN = ("SWANLAB_PROJECT", "SWANLAB_EXPERIMENT", "SWANLAB_WORKSPACE")

STATES = {"success": "success", "failed": "crashed", "interrupted": "aborted"}

console = swanlab.pkg.console
THEIR_WORDS = console.warning, console.error

log = logging.getLogger(__name__)


class OpenRunLogger(SwanLabLogger):  # type: ignore[misc]  # swanlab is untyped
    """Leaves the end of the run to `finish`, which can tell failed from interrupted."""

    def finalize(self, status: str | None = None) -> None:
        pass


class FirstTrouble:
    """Stands in for SwanLab's warnings and errors while a run is open. They come with every batch
    that a full disk or a dead network refuses; the first becomes one warning of ours."""

    def __init__(self, run: Any) -> None:
        online = run.mode == "online"
        self.remedy = f"; `{_sync_command(run)}` uploads what is missing" if online else ""
        self.told = False

    def __call__(self, *words: Any, console_args: tuple[Any, ...] = (), **_: Any) -> None:
        if not self.told:
            self.told = True
            reason = " ".join(" ".join(map(str, console_args or words)).split()).rstrip(".")
            log.warning("SwanLab: %s (said once); training goes on%s", reason, self.remedy)


def start(mode: str, arguments: Mapping[str, Any]) -> OpenRunLogger:
    """An open run. Online becomes offline, with one warning, where the service does not answer."""
    directory = Path(arguments["log_dir"])
    directory.mkdir(parents=True, exist_ok=True)
    if mode != "online":
        return _open_on_disk(mode, arguments)
    before = set(directory.iterdir())
    failures: list[str] = []
    try:
        with requests_within(ONLINE_SECONDS, failures):
            logger = _open("online", arguments)
    except Exception as error:  # noqa: BLE001  # whatever it is, it must not stop training
        _forget_start(set(directory.iterdir()) - before)
        logger = _open_on_disk("offline", arguments)
        reason = failures[-1] if failures else _one_line(error)
        log.warning(
            "SwanLab online did not start (%s); recording offline, `%s` uploads it later",
            reason,
            _sync_command(logger.experiment),
        )
    else:
        log.info("SwanLab run: %s", logger.experiment.url)
    return logger


def finish(run: Any, status: Status) -> None:
    """Closes the run under SwanLab's word for the status; waits until it is written."""
    if not run.alive:
        return
    try:
        with _quiet(), _bounded_upload(run._core), requests_within(UPLOAD_SECONDS, []):
            run.finish(state=STATES[status], error=None if status == "success" else status)
    finally:
        console.warning, console.error = THEIR_WORDS


def _open_on_disk(mode: str, arguments: Mapping[str, Any]) -> OpenRunLogger:
    try:
        return _open(mode, arguments)
    except Exception as error:
        raise LoragenError(f"SwanLab ({mode}) did not start: {_one_line(error)}") from error


def _open(mode: str, arguments: Mapping[str, Any]) -> OpenRunLogger:
    with _quiet(), _hidden_environment(), _interrupts_untouched():
        settings = swanlab.Settings(
            interactive=False,
            terminal=swanlab.Settings.Terminal(proxy_type="none"),
            probe=swanlab.Settings.Probe(requirements=False, git=False, monitor=False),
        )
        if swanlab.has_run():  # the logger would silently go on with it
            swanlab.finish()
        logger = OpenRunLogger(mode=mode, settings=settings, **arguments)
        run = logger.experiment  # the property starts the run
    console.warning = console.error = FirstTrouble(run)
    return logger


@contextmanager
def requests_within(seconds: float, failures: list[str]) -> Iterator[None]:
    """Every HTTP request of this thread ends before the deadline they share, whatever hangs.

    A timeout of requests bounds one read, not the name lookup nor a body that trickles; hence each
    request runs in a daemon thread that is left behind when time is up. Nothing is retried.
    `failures` gets the reasons, which SwanLab reports only as a wrong key.
    """
    owner, deadline, send = threading.get_ident(), monotonic() + seconds, HTTPAdapter.send

    def bounded(
        adapter: HTTPAdapter, request: PreparedRequest, stream: bool = False, *rest: Any, **kw: Any
    ) -> Response:
        if threading.get_ident() != owner:
            return send(adapter, request, stream, *rest, **kw)

        def answer() -> Response:
            response = send(adapter, request, stream, *rest, **kw)
            response.content  # noqa: B018  # reads the body while the clock runs
            return response

        retries, adapter.max_retries = adapter.max_retries, Retry(0, read=False)
        try:
            return _result_of(answer, deadline - monotonic())
        except TimeoutError:
            failures.append(f"{request.url}: no answer within {seconds:g} s")
            raise Timeout(failures[-1], request=request) from None
        except RequestException as error:
            failures.append(f"{request.url}: {type(error).__name__}")
            raise
        finally:
            adapter.max_retries = retries

    HTTPAdapter.send = bounded  # type: ignore[method-assign, assignment]  # restored below
    try:
        yield
    finally:
        HTTPAdapter.send = send  # type: ignore[method-assign]


def _result_of(call: Callable[[], Response], seconds: float) -> Response:
    """What the call returns; TimeoutError when it takes longer, and the call is left to itself."""
    future: Future[Response] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001  # handed to the one who waits
            future.set_exception(error)

    threading.Thread(target=work, daemon=True, name="swanlab-request").start()
    return future.result(timeout=max(0.0, seconds))


@contextmanager
def _quiet() -> Iterator[None]:
    """No banners. What SwanLab has to say later goes to stderr: stdout is for answers."""
    console.c.stderr, console.c.quiet = True, True
    try:
        yield
    finally:
        console.c.quiet = False


@contextmanager
def _bounded_upload(core: Any) -> Iterator[None]:
    """What is left goes to the service in the background, and is waited for so long only."""
    transport = core._transport
    if transport is None:  # not online
        yield
        return
    finish = transport.finish
    transport.finish = lambda timeout: finish(UPLOAD_SECONDS)  # noqa: ARG005  # asked for None
    no_stats = GetOperationStatsResponse(success=True)
    core.get_operation_stats = lambda: no_stats  # else a display waits for their end
    yield
    if core._transport is not None:  # not everything is uploaded
        _give_up(transport)


def _give_up(transport: Any) -> None:
    """Ends the thread that would try on for ever, and complain beside the next run."""
    nothing_left = SimpleNamespace(remaining_records=[], failures=[])
    transport._throttle = SimpleNamespace(warn=lambda: None, reset=lambda: None)
    transport._dispatcher = lambda _: nothing_left
    with transport._cond:
        transport._retry_at = None
        transport._cond.notify_all()


@contextmanager
def _hidden_environment() -> Iterator[None]:
    hidden = {name: os.environ.pop(name) for name in HIDDEN if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextmanager
def _interrupts_untouched() -> Iterator[None]:
    """SwanLab would finish the run inside its own Ctrl+C handler; that is for the caller to do."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


def _forget_start(leftovers: set[Path]) -> None:
    """Removes what a start that failed halfway has made: an empty run and a session."""
    for path in leftovers:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
    if client.exists():  # the next start would take it for logged in
        client.reset()


def _sync_command(run: Any) -> str:
    """Without the id SwanLab would make it another run."""
    return f"swanlab sync --id {run.id} {run.dir}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
