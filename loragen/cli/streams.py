"""The standard streams of the command line. No text and no encoding stops a command, and a training
goes on after its terminal, or the reader of its output, has gone away."""

import codecs
import errno
import io
import os
import sys
import time
from typing import Any

GONE = {errno.EPIPE, errno.EIO, errno.EINVAL, errno.ENXIO, errno.ECONNRESET, errno.ESHUTDOWN}
"""What writing raises after the reader of a pipe has ended, as `head` does, or the terminal is
closed. On Windows a broken pipe is EINVAL."""


class _Outlasting(io.RawIOBase):
    """Writes to a file descriptor until that fails, and from then on to nowhere."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        """`stream` writes to the file descriptor; it has to stay open."""
        self._stream = stream
        self._raw: Any = getattr(stream.buffer, "raw", stream.buffer)
        self.failure: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return int(self._raw.fileno())

    def isatty(self) -> bool:
        return self.failure is None and bool(self._raw.isatty())

    def write(self, data: Any) -> int:
        while self.failure is None:
            try:
                written = self._raw.write(data)
            except OSError as error:
                self.failure = error
            else:
                if written is not None:
                    return int(written)
                time.sleep(0.01)  # the descriptor does not block, and its reader is slow
        return len(data)


def _encoded(error: UnicodeError) -> tuple[str | bytes, int]:
    """Replaces a character that an encoding lacks by `?`; the bytes of a file name that are no
    text, which Python decodes as surrogates, are written as they were."""
    assert isinstance(error, UnicodeEncodeError)
    part = error.object[error.start : error.end]
    if all("\udc80" <= character <= "\udcff" for character in part):
        return part.encode("ascii", "surrogateescape"), error.end
    return "?" * len(part), error.end


def make_streams_last() -> None:
    """Replaces sys.stdout and sys.stderr by streams that never raise, and those that the caller has
    closed by the null device: the next file opened would get their number, and with it what
    libraries print."""
    codecs.register_error("loragen", _encoded)
    for name in ("stdin", "stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8")  # noqa: SIM115, PTH123  # open until the end
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)
        if name != "stdin" and isinstance(stream, io.TextIOWrapper):
            stream.flush()
            lasting = io.TextIOWrapper(
                io.BufferedWriter(_Outlasting(stream)),
                encoding=stream.encoding,
                errors="loragen",
                line_buffering=stream.line_buffering or name == "stderr",
            )
            setattr(sys, name, lasting)


def lost_output() -> str | None:
    """Returns why a part of stdout could not be written, for example on a full disk; None if all of
    it was, or nobody reads it any more."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    failure = raw.failure if isinstance(raw, _Outlasting) else None
    return None if failure is None or failure.errno in GONE else str(failure.strerror)
