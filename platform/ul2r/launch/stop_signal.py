"""SIGTERM during a run: a checkpoint after the current step, then a clean end."""

from __future__ import annotations

import logging
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Self

from ul2r.environment import is_started_by_torchrun
from ul2r.train.callbacks import Callback, LoopAction

SHUTDOWN_VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
"""Seconds that torchrun (2.13) leaves its processes after SIGTERM, where its --shutdown-timeout does not say it."""

logger = logging.getLogger(__name__)


class StopSignal(Callback):
    """Handler of SIGTERM while the block runs: requests a stop, and at a second one interrupts as Ctrl-C does.

    Attributes:
        received: Set by the first SIGTERM.
    """

    def __init__(self) -> None:
        self.received = threading.Event()
        self._is_announced = False

    def __enter__(self) -> Self:
        # Only the main thread may set a handler; elsewhere the process keeps the one that it has.
        self._installed = threading.current_thread() is threading.main_thread()
        if self._installed:
            self._before = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._installed:
            signal.signal(signal.SIGTERM, self._before)

    def requested_action(self) -> LoopAction:
        """Return STOP once SIGTERM was received."""
        if not self.received.is_set():
            return LoopAction.CONTINUE
        # Not in the handler, which may interrupt a thread that holds the lock of a log.
        if not self._is_announced:
            self._is_announced = True
            logger.info("stopping after a checkpoint; once more to stop at once%s", _limit())
        return LoopAction.STOP

    def _handle(self, _: int, __: FrameType | None) -> None:
        # The first signal only sets a flag: an exception in the middle of a collective would leave the other ranks
        # waiting.
        if self.received.is_set():
            raise KeyboardInterrupt
        self.received.set()


def _limit() -> str:
    """Return, for a log line, how long torchrun lets its processes live after it has sent them SIGTERM."""
    if not is_started_by_torchrun():
        return ""
    # No process can change the limit of the torchrun that has started it.
    return (
        f". torchrun ends this process {os.environ.get(SHUTDOWN_VARIABLE, '30')} s after SIGTERM, unless its "
        f"--shutdown-timeout or {SHUTDOWN_VARIABLE} allows more: a checkpoint that is not complete by then is lost, "
        "the previous one is not"
    )
