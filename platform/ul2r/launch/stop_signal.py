"""SIGTERM during a run: a checkpoint after the current step, then a clean end."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Self

from ul2r.train.callbacks import Callback, LoopAction


class StopSignal(Callback):
    """Handler of SIGTERM while the block runs: requests a stop, and at a second one interrupts as Ctrl-C does.

    Attributes:
        received: Set by the first SIGTERM.
    """

    def __init__(self) -> None:
        self.received = threading.Event()

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
        return LoopAction.STOP if self.received.is_set() else LoopAction.CONTINUE

    def _handle(self, _: int, __: FrameType | None) -> None:
        # The first signal only sets a flag: an exception in the middle of a collective would leave the other ranks
        # waiting.
        if self.received.is_set():
            raise KeyboardInterrupt
        self.received.set()
