"""Locks between the processes that see a folder; they end with the process that holds them, however it ends."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

POLL_S = 0.5
"""How often one who waits for a lock tries."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Be the only one, of those who lock `path`, while the block runs; others are waited for.

    The lock is a file beside `path`, which stays, whether or not `path` exists.
    """
    with _lock_file(path).open("a") as file:
        while not _take(file.fileno(), fcntl.LOCK_EX):
            time.sleep(POLL_S)
        yield


def is_locked(path: Path) -> bool:
    """Whether somebody is in `locked`."""
    if not _lock_file(path).is_file():
        return False
    with _lock_file(path).open() as file:
        return not _take(file.fileno(), fcntl.LOCK_SH)


def _take(file: int, kind: int) -> bool:
    """Take the lock, which is kept until the file is closed, unless somebody has it."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lock_file(path: Path) -> Path:
    return Path(f"{os.fspath(path)}.lock")
