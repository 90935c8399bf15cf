"""What SIGTERM does to a run: a checkpoint after the running step, then a clean end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def sigterm_noted() -> Iterator[threading.Event]:
    """Let SIGTERM set the event that is given to the block; a second one interrupts it as Ctrl-C does."""
    noted = threading.Event()

    def note(_: int, __: FrameType | None) -> None:
        if noted.is_set():
            raise KeyboardInterrupt
        noted.set()

    if threading.current_thread() is not threading.main_thread():
        yield noted  # only the main thread may change what a signal does
        return
    before = signal.signal(signal.SIGTERM, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGTERM, before)
