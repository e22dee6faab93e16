"""Ctrl+C, and a scheduler's SIGTERM, without losing a step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from loragen.core.errors import EXIT_INTERRUPTED, LoragenError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(LoragenError):  # noqa: N818  # nothing went wrong
    """The user, or the scheduler, wanted the training to stop; it can be gone on with."""

    exit_code = EXIT_INTERRUPTED


class Interruption:
    """Remembers a first signal until the step is finished; a second one is not waited for."""

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Within the block. Signals reach the main thread alone; elsewhere nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        self.listen()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def listen(self) -> None:
        """Once more when training begins: Lightning's own answer to SIGTERM, set in between, ends
        it between two accumulation rounds or validation batches."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002  # the signal module's
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def requested_on_any(self, trainer: Any) -> bool:
        """The ranks decide together: one that stopped alone would leave the others waiting."""
        if trainer.world_size == 1:
            return self.requested
        return bool(trainer.strategy.reduce_boolean_decision(self.requested, all=False))

    def error_after(self, step: int, steps: int, command: str) -> Interrupted:
        """`command` goes on with the run: `lora train --resume RUN`."""
        return Interrupted(
            f"interrupted after step {step} of {steps}, which is saved; to go on: loragen {command}"
        )
