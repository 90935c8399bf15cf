"""Log records of the library, as people who run a job read them.

Library code logs with its module's logger and never writes to stderr itself. A job prints the records on stderr;
under Ray Train the workers' records are sent to the driver, which logs them as its own.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LIBRARY = "ul2r"
"""Parent of the library's loggers."""

Send = Callable[[str, int, str], None]
"""Takes a record's logger name, level and message."""


class RankFilter(logging.Filter):
    """Passes every record of rank 0, and from other ranks only warnings and errors.

    All ranks run the same code, so that their INFO records repeat those of rank 0.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is passed on."""
        return self._rank == 0 or record.levelno >= logging.WARNING


class ConsoleHandler(logging.Handler):
    """Writes one line per record to stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record."""
        # Looked up at each write: a progress bar replaces `sys.stderr` while it is drawn.
        sys.stderr.write(f"{self.format(record)}\n")
        sys.stderr.flush()


class ConsoleFormatter(logging.Formatter):
    """Formats records of the library as plain messages, and those of other libraries with their origin."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's line or lines."""
        if record.name.partition(".")[0] == LIBRARY:
            return record.getMessage()
        return super().format(record)


def configure_console(rank: int = 0) -> None:
    """Print the library's records from INFO on, and warnings of other libraries, on stderr.

    Args:
        rank: Rank of this process where several run the same job, as under torchrun.
    """
    # One handler at the root, so that each record is printed once, whichever library logs it.
    handler = ConsoleHandler()
    handler.setFormatter(ConsoleFormatter("%(levelname)s %(name)s: %(message)s"))
    handler.addFilter(RankFilter(rank))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger(LIBRARY).setLevel(logging.INFO)


class ForwardingHandler(logging.Handler):
    """Hands each record of a worker to a function that sends it to the driver."""

    def __init__(self, send: Send) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        """Send the record; only its text, since its arguments may not be picklable."""
        self._send(record.name, record.levelno, record.getMessage())


@contextmanager
def forward_logs(send: Send, rank: int) -> Iterator[None]:
    """Send the library's records of this worker to the driver during the block.

    Args:
        send: Sends a record.
        rank: Rank of this worker.
    """
    library = logging.getLogger(LIBRARY)
    level = library.level
    handler = ForwardingHandler(send)
    handler.addFilter(RankFilter(rank))

    # Besides the handlers of the root logger: records are in Ray's log files of the worker as well.
    library.addHandler(handler)
    library.setLevel(logging.INFO)
    try:
        yield
    finally:
        library.removeHandler(handler)
        library.setLevel(level)
