"""SwanLab in a process of its own, so that it cannot block training.

SwanLab waits for its service without a limit (75 seconds for a silent host at the start, for ever
at the end), keeps a global lock while it waits, prints on stdout, and installs handlers for Ctrl+C,
exceptions and the exit of the interpreter. A process can be killed after a timeout.

Both sides exchange JSON lines: the parent writes the arguments of `swanlab.init`, metrics, and then
the final state; the child answers once, when the run is open or has failed to open. Everything else
that the child prints is SwanLab's own output.
"""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Any

from loragen.core.errors import LoragenError

ANSWER = "loragen: "
"""The prefix of the line with which the child answers."""

# SwanLab parses the first two as groups of settings and refuses to start. The values of all three
# reach it as arguments.
HIDDEN = ("SWANLAB_PROJECT", "SWANLAB_EXPERIMENT", "SWANLAB_WORKSPACE")

MAX_UNREAD = 10_000
"""Messages that wait for a child that does not read them; one more is an error."""
ORPHAN_SECONDS = 60.0
"""How long a child may take to end a run whose training process is gone."""

log = logging.getLogger(__name__)


class SwanLabProcess:
    """One run, recorded by a child process. The constructor returns when the run is open."""

    def __init__(self, arguments: Mapping[str, Any], seconds: float) -> None:
        """Raises LoragenError if SwanLab refuses to start or has not started after `seconds`; the
        files of the run are deleted then."""
        self.run_id = self.sync_command = ""
        self.url: str | None = None
        self._warned, self._last_message = False, ""
        self._answers: Queue[dict[str, Any] | None] = Queue()
        self._messages: Queue[str | None] = Queue(MAX_UNREAD)
        directory = Path(arguments["log_dir"])
        before = set(directory.iterdir())
        environment = {name: os.environ[name] for name in os.environ if name not in HIDDEN}
        environment |= {
            "COLUMNS": "10000",  # so that a message is one line
            "PYTHONIOENCODING": "utf-8",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # imports what the parent does
        }
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
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
        # Without the id, SwanLab would upload the files as another run.
        self.sync_command = f"swanlab sync --id {self.run_id} {answer['dir']}"

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Sends the metrics. Raises OSError if the process has ended or no longer reads."""
        self._send({"step": step, "metrics": {name: float(metrics[name]) for name in metrics}})

    def finish(self, state: str, error: str | None, seconds: float) -> None:
        """Ends the run and waits, no longer than `seconds`, until it is written and uploaded."""
        try:
            self._send({"state": state, "error": error})
            self._process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self._warn(f"the run has not ended within {seconds:g} s")
        finally:
            self._kill()

    def _send(self, message: Mapping[str, Any]) -> None:
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
        opened = False
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                opened = True
                self._answers.put(json.loads(line.removeprefix(ANSWER)))
            elif " | WARNING " in line or " | ERROR " in line:
                self._last_message = line.partition(" - ")[2].strip().rstrip(".")
                if opened:
                    self._warn(self._last_message)
        self._answers.put(None)

    def _warn(self, reason: str) -> None:
        """Logs the first of SwanLab's warnings; a full disk or a dead network causes one for every
        batch."""
        if not self._warned:
            self._warned = True
            remedy = f"; `{self.sync_command}` uploads what is missing" if self.url else ""
            log.warning("SwanLab: %s (reported once); training continues%s", reason, remedy)

    def _kill(self) -> None:
        self._process.kill()
        with suppress(Full):  # the thread that writes ends, or fails at the closed pipe
            self._messages.put_nowait(None)
        self._reader.join(timeout=1)
        with suppress(OSError), self._process:  # closes the pipes and waits
            pass


def record_run() -> None:
    """Runs in the child: opens the run, logs the metrics that arrive, and finishes with the given
    state, or as crashed if the parent ends without one."""
    # A scheduler signals all processes of a job; the parent decides how the run ends.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    arguments = json.loads(sys.stdin.readline())
    try:
        import swanlab

        settings = swanlab.Settings(
            interactive=False,
            terminal=swanlab.Settings.Terminal(proxy_type="none"),
            probe=swanlab.Settings.Probe(requirements=False, git=False, monitor=False),
        )
        run = swanlab.init(settings=settings, **arguments)
    except Exception as error:  # noqa: BLE001  # reported to the parent
        reason = " ".join(str(error).split()) or type(error).__name__
        print(ANSWER + json.dumps({"error": reason}), flush=True)
        return
    url = run.url if run.mode == "online" else None
    print(ANSWER + json.dumps({"id": run.id, "dir": str(run.dir), "url": url}), flush=True)
    for line in sys.stdin:
        message = json.loads(line)
        if "state" in message:
            run.finish(**message)
            return
        run.log(message["metrics"], step=message["step"])
    # The parent has ended, so nobody reads the output that SwanLab prints when it finishes.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    end = threading.Timer(ORPHAN_SECONDS, os._exit, (1,))
    end.daemon = True
    end.start()
    run.finish(state="crashed", error="the training process has ended")


if __name__ == "__main__":
    record_run()
