"""Files that are never seen half-written, and locks between processes.

Everything durable is written under a temporary name in the same folder and then renamed, which POSIX does atomically:
a reader, or a process that starts after a crash, sees the old content or the new one and nothing in between.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK_POLL_S = 0.5
"""Seconds between two attempts to take a lock."""
STAGING_SUFFIX = ".writing"
"""Ends the name of a file or folder that is not complete yet."""


def staging_path(path: Path) -> Path:
    """Return a new hidden name in `path`'s folder, on the same file system, so that a rename to `path` is atomic.

    The name keeps `path`'s suffix in front of its own, and no other process or thread is given the same one.
    """
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{STAGING_SUFFIX}")


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """Yield a name to write a file to; rename it to `path` at the end of the block, remove it if the block fails."""
    staging = staging_path(path)
    try:
        yield staging
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


@contextmanager
def staging_dir(path: Path) -> Iterator[Path]:
    """Yield a new empty folder; let it replace `path` at the end of the block, remove it if the block fails."""
    staging = staging_path(path)
    staging.mkdir(parents=True)
    try:
        yield staging
        # A rename cannot replace a folder that has files. Between these two calls there is no folder at all, so a
        # reader has to expect that it is missing, but never that it is incomplete.
        if path.exists():
            shutil.rmtree(path)
        staging.rename(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file at once: readers see its old content or `content`. Text is encoded as UTF-8.

    The data is not forced to the disk: after a power failure the file may be the old one.
    """
    data = content.encode() if isinstance(content, str) else content
    with staged_file(path) as staging:
        staging.write_bytes(data)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal."""
    with path.open("rb") as file:
        # In chunks: a file of weights may be larger than the memory.
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`; block until acquired.

    The lock is the file `path`.lock, which stays; `path` itself need not exist. The system releases the lock when the
    process that holds it ends, however it ends.
    """
    with _lock_file(path).open("a") as file:
        # "a" creates the file and leaves its content.
        while not _try_lock(file.fileno(), fcntl.LOCK_EX):
            time.sleep(LOCK_POLL_S)
        yield


def is_locked(path: Path) -> bool:
    """Return whether some process holds `file_lock(path)`."""
    if not _lock_file(path).is_file():
        return False
    with _lock_file(path).open() as file:
        # A shared lock, so that two processes that ask at once do not take each other for the holder. Closing the file
        # releases it.
        return not _try_lock(file.fileno(), fcntl.LOCK_SH)


def _try_lock(file: int, kind: int) -> bool:
    try:
        # flock and not lockf: its locks belong to the open file, so they also exclude threads of one process.
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lock_file(path: Path) -> Path:
    return Path(f"{os.fspath(path)}.lock")
