"""A tracking library in a process of its own, so that it can neither block nor disturb training.

Such libraries wait for their services (SwanLab 75 seconds for a silent host at the start and for
ever at the end, MLflow several minutes a request), keep global locks, settings and one current run
per process, print on stdout, ask questions on stdin, and install handlers for Ctrl+C, exceptions
and the exit of the interpreter. A process can be killed after a timeout.

Both sides exchange JSON lines: the parent writes the arguments of the plugin's function, metrics,
and then the status; the child answers once when the run is open or has failed to open, and again if
logging fails. Everything else that the child prints is the library's own output.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from queue import Empty, Full, Queue
from typing import TYPE_CHECKING, Any

from loragen.core.errors import LoragenError, UsageError, pip_install, shortened
from loragen.core.protocols import RunInfo, Status

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

ANSWER = "loragen: "
"""The prefix of the lines with which the child answers."""
MAX_UNREAD = 10_000
"""Messages that wait for a child that does not read them; one more is an error."""
DISK_SECONDS = 120.0
"""Timeout to open a run that needs no service; only a stalled disk takes that long."""
ONLINE_SECONDS = 30.0
"""Timeout for a service to open the run, when training starts."""
UPLOAD_SECONDS = 60.0
"""Timeout for what remains to be written or uploaded when training ends."""
NO_WARNING = r"(?!)"
"""A pattern that nothing matches."""
ORPHAN_SECONDS = 60.0
"""How long a child may take to end a run whose training process is gone."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recording:
    """An open run, in the child: what a plugin's function returns for its arguments."""

    run_id: str
    log: Callable[[dict[str, float], int], object]
    """Logs metrics at a step."""
    finish: Callable[[Status, str | None], object]
    """Ends the run, with the reason if it did not succeed."""
    directory: str = ""
    """Where it is recorded, for the command that uploads it later."""
    url: str | None = None
    """Where it is shown, if it is online."""


@dataclass(frozen=True)
class Library:
    """What the parent has to know of a tracking library."""

    label: str
    recorder: str
    """``"module:function"``, which opens a run in the child and returns a `Recording`."""
    environment: Mapping[str, str | None]
    """Variables of the child; None removes one."""
    warning: str
    """A regular expression for a warning in the child's output; group 1 is its text."""
    upload: str = ""
    """The command that uploads a run that was recorded offline; `{id}` and `{directory}`."""


def require(package: str, extra: str) -> None:
    """Raises UsageError, before training starts, if a logger's package is not installed."""
    if find_spec(package) is None:
        raise UsageError(f"logger '{extra}' needs {package}: {pip_install(extra)}")


class RecordingProcess:
    """One run, recorded by a child process. The constructor returns when the run is open."""

    def __init__(
        self, library: Library, arguments: Mapping[str, Any], directory: Path, seconds: float
    ) -> None:
        """The child works in `directory`, which is created. Raises LoragenError if the library
        refuses to start or has not started after `seconds`; the files of the run are deleted
        then."""
        self.library, self.run_id, self.upload_command = library, "", ""
        self.url: str | None = None
        self._warned, self._last_message, self._failure = False, "", ""
        self._answers: Queue[dict[str, Any] | None] = Queue()
        self._messages: Queue[str | None] = Queue(MAX_UNREAD)
        directory.mkdir(parents=True, exist_ok=True)
        before = set(directory.iterdir())
        environment: dict[str, str | None] = {
            **os.environ,
            "COLUMNS": "10000",  # so that a message is one line
            "DO_NOT_TRACK": "1",
            "PYTHONIOENCODING": "utf-8",
            "PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path))),
            **library.environment,
        }
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, library.recorder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=directory,
            env={name: value for name, value in environment.items() if value is not None},
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # only the parent receives Ctrl+C
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # same on Windows
        )
        self._reader = threading.Thread(target=self._read_output, daemon=True)
        self._reader.start()
        # A pipe that nobody reads blocks whoever writes to it: that must not be the training.
        threading.Thread(target=self._write_messages, daemon=True).start()
        try:
            self._send(arguments)
            answer = self._answers.get(timeout=seconds) or {"error": "its process has ended"}
        except Empty:
            answer = {"error": f"no answer within {seconds:g} s"}
        except OSError as error:
            answer = {"error": str(error)}
        except BaseException:
            self._kill()
            raise
        if "error" in answer:
            self._kill()
            for path in set(directory.iterdir()) - before:
                shutil.rmtree(path, ignore_errors=True)
            raise LoragenError(": ".join(filter(None, (answer["error"], self._last_message))))
        self.run_id, self.url = answer["id"], answer["url"]
        self.upload_command = library.upload.format(id=self.run_id, directory=answer["directory"])

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Sends the metrics. Raises OSError if the process has ended or no longer reads, and
        LoragenError if the library has failed since the last call."""
        self._send({"step": step, "metrics": {name: float(metrics[name]) for name in metrics}})

    def finish(self, status: Status, seconds: float) -> None:
        """Ends the run and waits, no longer than `seconds`, until it is written and uploaded."""
        try:
            reason = None if status == "success" else status
            self._send({"status": status, "reason": reason})
            self._process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self._warn(f"the run has not ended within {seconds:g} s")
        finally:
            self._kill()
        if self._failure:
            raise LoragenError(self._failure)

    def _send(self, message: Mapping[str, Any]) -> None:
        if self._failure:
            raise LoragenError(self._failure)
        if self._process.poll() is not None:
            raise BrokenPipeError("its process has ended")
        try:
            self._messages.put_nowait(json.dumps(message) + "\n")
        except Full:
            raise OSError("its process does not respond") from None

    def _write_messages(self) -> None:
        """Writes to the child, in a thread, until the process ends."""
        assert self._process.stdin is not None
        with suppress(OSError, ValueError):  # the process has ended, and its pipe is closed
            while (message := self._messages.get()) is not None:
                self._process.stdin.write(message)
                self._process.stdin.flush()

    def _read_output(self) -> None:
        """Reads the child's output, in a thread, until the process ends."""
        assert self._process.stdout is not None
        opened, warning = False, re.compile(self.library.warning)
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                answer = json.loads(line.removeprefix(ANSWER))
                if opened:
                    self._failure = answer["error"]
                else:
                    opened = True
                    self._answers.put(answer)
            elif found := warning.search(line):
                self._last_message = found[1].strip().rstrip(".")
                if opened:
                    self._warn(self._last_message)
        self._answers.put(None)

    def _warn(self, reason: str) -> None:
        """Logs the first of the library's warnings; a full disk or a dead network causes one for
        every batch."""
        if not self._warned:
            self._warned = True
            remedy = f"; `{self.upload_command}` uploads what is missing" if self.url else ""
            log.warning(
                "%s: %s (reported once); training continues%s", self.library.label, reason, remedy
            )

    def _kill(self) -> None:
        self._process.kill()
        with suppress(Full):  # the thread that writes ends, or fails at the closed pipe
            self._messages.put_nowait(None)
        self._reader.join(timeout=1)
        with suppress(OSError), self._process:  # closes the pipes and waits
            pass


def open_or_offline(
    library: Library,
    arguments: Mapping[str, Any],
    mode: str,
    directory: Path,
    online_seconds: float,
) -> RecordingProcess:
    """Opens a run of a library with an argument `mode`. If a service does not answer within
    `online_seconds`, a warning is logged and the run is recorded offline. A disabled one has no
    `run_id`."""
    reason = None
    if mode == "online":
        try:
            arguments = {**arguments, "mode": mode}
            process = RecordingProcess(library, arguments, directory, online_seconds)
        except LoragenError as error:
            mode, reason = "offline", error
        else:
            log.info("%s run: %s", library.label, process.url)
            return process
    try:
        process = RecordingProcess(library, {**arguments, "mode": mode}, directory, DISK_SECONDS)
    except LoragenError as error:
        raise LoragenError(f"{library.label} ({mode}) did not start: {error}") from error
    if mode == "disabled":
        process.run_id = ""
    if reason:
        log.warning(
            "%s online did not start (%s); recording offline, `%s` uploads the run later",
            library.label,
            reason,
            process.upload_command,
        )
    return process


class ProcessLogger(ABC):
    """A logger plugin whose library runs in a process of its own. A subclass has a nested `Config`,
    and `start`, which opens a run."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.run_id: str | None = None
        self._process: RecordingProcess | None = None

    @abstractmethod
    def start(self, run: RunInfo) -> RecordingProcess: ...

    def open(self, run: RunInfo) -> Logger:
        from lightning.pytorch.loggers import Logger  # not to validate a configuration

        process = self._process = self.start(run)
        self.run_id = process.run_id or None

        class ToProcess(Logger):
            name = process.library.label
            version = process.run_id

            def log_metrics(self, metrics: Any, step: int | None = None) -> None:
                process.log_metrics(metrics, step or 0)

            def log_hyperparams(self, *_: Any, **__: Any) -> None:
                """Does nothing: the configuration was recorded when the run was opened."""

        return ToProcess()

    def close(self, status: Status) -> None:
        if self._process is not None:
            process, self._process = self._process, None
            process.finish(status, UPLOAD_SECONDS)


def _record_run(recorder: str) -> None:
    """Runs in the child: opens the run, logs the metrics that arrive, and finishes with the given
    status, or as failed if the parent ends without one."""
    # A scheduler signals all processes of a job; the parent decides how the run ends.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # Nobody answers a library that asks a question, and it must not read the metrics.
    messages = os.fdopen(os.dup(0), encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    arguments = json.loads(messages.readline())
    with _reporting_errors():
        module, _, function = recorder.partition(":")
        run: Recording = getattr(import_module(module), function)(**arguments)
        _answer({"id": run.run_id, "directory": run.directory, "url": run.url})
        for line in messages:
            message = json.loads(line)
            if "status" in message:
                run.finish(message["status"], message["reason"])
                return
            run.log(message["metrics"], message["step"])
    # The parent has ended, so nobody reads the output that the library prints when it finishes.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    end = threading.Timer(ORPHAN_SECONDS, os._exit, (1,))
    end.daemon = True
    end.start()
    run.finish("failed", "the training process has ended")


def _answer(answer: Mapping[str, str | None]) -> None:
    # A question of the library may have left an unfinished line.
    print(f"\n{ANSWER}{json.dumps(answer)}", flush=True)


@contextmanager
def _reporting_errors() -> Iterator[None]:
    try:
        yield
    except (Exception, SystemExit) as error:  # noqa: BLE001  # reported to the parent
        reason = shortened(str(error), 400) or type(error).__name__
        _answer({"error": reason})
        os._exit(1)  # whatever the library does at exit, nobody waits for it


if __name__ == "__main__":
    _record_run(sys.argv[1])
