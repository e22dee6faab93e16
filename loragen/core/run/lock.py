"""The lock of a run directory: one process at a time writes a run.

Two things make it. The operating system locks `.run.lock`, and frees the lock when the process
ends, however it ends. And the writer renews the time of `.writer.json`, which says who it is, every
few seconds. On one machine the first decides. Between machines it does if their file system shares
locks, as NFS 4, NFS 3 with a lock daemon, Lustre with `-o flock`, and SMB do. Where it does not
(NFS mounted with `nolock` or `local_lock`), another machine watches whether the time changes: that
needs neither equal clocks nor more than that a file that is opened shows its current time, which
NFS promises.
"""

import errno
import json
import os
import socket
import tempfile
import threading
import time
from contextlib import suppress
from logging import getLogger
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import psutil
from filelock import FileLock, Timeout

from loragen.core.errors import LoragenError, UsageError, WriteError
from loragen.core.files import write_json

log = getLogger(__name__)

LOCK, WRITER = ".run.lock", ".writer.json"
BEAT_SECONDS = 5.0
"""The time between two signs of life of a writer."""
SILENT_SECONDS = 3 * BEAT_SECONDS
"""A writer on another machine that gives no sign of life for so long has ended without freeing its
run."""
LEASE_SECONDS = 120.0
"""How long a server may hold the locks of a machine that has died: a lease of NFS 4 is 90 s."""
CHILDREN_SECONDS = 10.0
"""How long the data loader processes of a killed process, which share its lock, may outlive it."""

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""What locking raises on a file system that has no locks."""


class Writer(NamedTuple):
    """The process that writes a run."""

    process: int
    host: str
    token: str
    """Tells it from an earlier process of the same number."""

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"


class RunLock:
    """The lock of one run, from `acquire` to `release` or the end of this process."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._me = Writer(os.getpid(), socket.gethostname(), uuid4().hex)
        self._file = FileLock(directory / LOCK, timeout=0, thread_local=False)
        self._ended = threading.Event()
        self._locks = True  # until the file system says that it has none

    def acquire(self) -> "RunLock":
        """Raises UsageError naming the process that writes the run, or if its directory cannot be
        written. The sign of life of a writer on another machine is waited for."""
        began, (_, first_beat) = time.monotonic(), _recorded_writer(self.directory)
        told = False
        while True:
            free = self._try()
            writer, beat = _recorded_writer(self.directory)
            waited = time.monotonic() - began
            elsewhere = writer is not None and (writer.host != self._me.host or not self._locks)
            if elsewhere:
                patience = SILENT_SECONDS if free else LEASE_SECONDS
                lives = beat != first_beat or (not free and waited >= patience)
            elif writer is not None and psutil.pid_exists(writer.process):
                patience, lives = 0.0, not free
            else:
                patience, lives = 0.0, not free and waited >= CHILDREN_SECONDS
            if lives:
                self._file.release(force=True)
                who = str(writer) if writer else "another process"
                raise UsageError(f"{self.directory} is being written by {who}")
            if free and waited >= patience:
                break
            if elsewhere and not told:
                log.info(
                    "%s was written by %s, which has not freed it; waiting %.0f s for a sign of it",
                    self.directory,
                    writer,
                    patience,
                )
                told = True
            time.sleep(min(0.5, BEAT_SECONDS / 2))
        try:
            write_json(self.directory / WRITER, self._me._asdict())
        except WriteError:
            self._file.release(force=True)
            raise
        except OSError as error:
            self._file.release(force=True)
            raise UsageError(f"{self.directory}: cannot be written: {error.strerror}") from None
        threading.Thread(target=self._beat, daemon=True, name="run lock").start()
        return self

    @property
    def released(self) -> bool:
        return self._ended.is_set()

    def release(self) -> None:
        """Frees the run; a second call does nothing."""
        if self.released:
            return
        self._ended.set()
        with suppress(OSError):
            if self.is_ours():
                (self.directory / WRITER).unlink()
        self._file.release(force=True)

    def is_ours(self) -> bool:
        """Returns whether no other process has taken the run, as one on another machine may where
        the file system shares no locks and this process stood still for a while."""
        writer, _ = _recorded_writer(self.directory)
        return writer in (None, self._me)

    def check(self) -> None:
        """Raises LoragenError if the run is no longer ours."""
        if not self.is_ours():
            writer, _ = _recorded_writer(self.directory)
            raise LoragenError(
                f"{self.directory} is now written by {writer}; this training stops and leaves the "
                "run to it"
            )

    def _try(self) -> bool:
        if self._file.is_locked:
            return True
        try:
            self._file.acquire()
        except Timeout:
            return False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise UsageError(f"{self.directory}: cannot be written: {error.strerror}") from None
            self._locks = False
        return True

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with suppress(OSError):  # a full disk, or a server that does not answer now
                os.utime(self.directory / WRITER)


def writer_of(directory: Path) -> str | None:
    """Returns the process that writes a run at this moment; None if there is none. Nothing is
    written, so that this may be asked of a run that belongs to others.

    A writer on another machine that shares no locks is one as long as it gives signs of life. They
    are compared with the clock of the file system, if a file can be made beside the run.
    """
    held = _is_held(directory / LOCK)
    writer, beat = _recorded_writer(directory)
    if held:
        return str(writer or "another process")
    if writer is None or (held is False and writer.host == socket.gethostname()):
        return None
    return str(writer) if _time_at(directory.parent) - beat / 1e9 < SILENT_SECONDS else None


def _is_held(file: Path) -> bool | None:
    """Returns whether a process holds the lock; None if the file system does not say."""
    if os.name == "nt":
        lock = FileLock(file, timeout=0, thread_local=False)
        try:
            if file.is_file():
                lock.acquire()
        except Timeout:
            return True
        except OSError:
            return None
        lock.release(force=True)
        return False
    import fcntl

    try:
        with file.open("rb") as opened:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)  # freed when the file is closed
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


def _time_at(folder: Path) -> float:
    """Returns the time (s) by the clock that gives the files of a folder theirs."""
    with suppress(OSError), tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime
    return time.time()


def _recorded_writer(directory: Path) -> tuple[Writer | None, int]:
    """Returns the writer that is recorded and the time of its last sign of life (ns); None if the
    run is free, or its record is being written."""
    try:
        with (directory / WRITER).open("rb") as file:  # opened: NFS then asks the server
            beat = os.fstat(file.fileno()).st_mtime_ns
            return Writer(**json.load(file)), beat
    except (OSError, ValueError, TypeError):
        return None, 0
