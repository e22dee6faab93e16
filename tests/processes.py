"""Command lines in processes of their own."""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path

PRELOADED = [
    "loragen.cli.main",  # first: what it sets in the environment is read when torch is loaded
    "loragen.core.lora.train",
    "peft",
    "transformers.models.qwen2.modeling_qwen2",
]
HEAVY = ("torch", "lightning", "peft", "transformers", "sentence_transformers", "swanlab", "ray")
CODE = f"""
import contextlib, io, json, sys
from loragen.cli.main import main

for arguments in json.loads(sys.argv[1]):
    sys.argv = ["loragen", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main() or 0
        except SystemExit as end:
            code = end.code
    heavy = [name for name in {HEAVY!r} if name in sys.modules]
    print(json.dumps([code, out.getvalue(), err.getvalue(), heavy]))
"""


def run_in_turn(commands, cwd=None, python=sys.executable):
    """Runs them one after the other in one process; gives each with its (exit code, stdout, stderr,
    heavy packages that have been imported by then)."""
    given = json.dumps([[str(argument) for argument in command] for command in commands])
    result = subprocess.run(
        [python, "-c", CODE, given], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
    found = [tuple(json.loads(line)) for line in result.stdout.splitlines()]
    return list(zip(commands, found, strict=True))


class Command:
    """`loragen ARGUMENTS` in a process group of its own, forked from a process that has imported
    torch once for all of them: it trains at once. Not on Windows."""

    def __init__(self, work: Path, *arguments):
        context = get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._files = [work / "stdout.txt", work / "stderr.txt"]
        given = [str(argument) for argument in arguments]
        self._process = context.Process(target=_run, args=(work, self._files, given))
        self._process.start()
        self.pid = self._process.pid

    def running(self):
        return self._process.is_alive()

    def finish(self, seconds=100):
        """Waits for its end; (exit code, stdout, stderr)."""
        self._process.join(seconds)
        assert not self.running(), "it does not end"
        return self._process.exitcode, *(file.read_text("utf-8") for file in self._files)


def _run(work, files, arguments):
    os.setpgid(0, 0)
    os.chdir(work)
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = ["loragen", *arguments]

    from loragen.cli.main import main

    main()


@contextmanager
def commands():
    """Yields `start(work, *arguments)`, which starts a `Command`; all that still runs at the end
    of the block is killed, with its children."""
    started = []

    def start(work, *arguments):
        started.append(Command(work, *arguments))
        return started[-1]

    try:
        yield start
    finally:
        for process in started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.finish()
