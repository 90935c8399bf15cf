"""The actor between a run's workers and the driver, in a module that imports nothing: its process starts soon."""

from __future__ import annotations

from typing import Literal, NamedTuple

LogRecord = tuple[str, int, str]
"""Logger name, level and message of a worker's record."""
Phase = Literal["starting", "loading", "training"]
"""Phase of a group of workers: its processes start, its workers prepare their first step, or it has made one."""


class BoardContent(NamedTuple):
    """Content of the board, as a read returns it."""

    progress: tuple[int, str]
    """Tokens and a note."""
    records: list[LogRecord]
    """Log records since the last read."""
    phase: Phase
    failure: str
    """Reason for the last restart of the workers, empty before it."""


class BoardActor:
    """Holds progress, phase, log records not yet read, and whether the run shall stop."""

    def __init__(self) -> None:
        self._progress = (0, "")
        self._records: list[LogRecord] = []
        self._phase: Phase = "starting"
        self._failure = ""
        self._is_stopping = False

    def begin(self) -> None:
        """Note that the processes of all workers run."""
        self._phase = "loading"

    def restart(self, failure: str) -> None:
        """Note that the workers are started again, and why."""
        self._phase = "starting"
        self._failure = failure

    def report(self, tokens: int, note: str) -> bool:
        """Take the progress; return whether the run shall stop."""
        self._progress = (tokens, note)
        # A late report of workers that have been replaced changes nothing: theirs have not begun.
        if self._phase == "loading":
            self._phase = "training"
        return self._is_stopping

    def log(self, name: str, level: int, message: str) -> None:
        """Keep a worker's log record for the driver."""
        self._records.append((name, level, message))

    def stop(self) -> None:
        """Note that the run shall stop."""
        self._is_stopping = True

    def read(self) -> BoardContent:
        """Return the content; log records are returned once."""
        records, self._records = self._records, []
        return BoardContent(self._progress, records, self._phase, self._failure)
