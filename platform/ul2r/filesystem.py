"""Files that are never seen half-written, removals that end no run, and locks between processes.

Everything durable is written under a temporary name in the same folder and then renamed, which POSIX does atomically:
a reader, or a process that starts after a crash, sees the old content or the new one and nothing in between.
"""

from __future__ import annotations

import difflib
import fcntl
import hashlib
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import CDLL
from pathlib import Path

MAX_SUGGESTIONS = 8
"""Near names that are looked at."""
LOCK_POLL_S = 0.5
"""Seconds between two attempts to take a lock."""
STAGING_SUFFIX = ".writing"
"""Ends the name of a file or folder that is not complete yet."""
PREVIOUS_SUFFIX = ".previous"
"""Ends the name of a complete folder that is being replaced."""
LIBC = CDLL(None)
# Constants of Linux's <fcntl.h>, which Python does not define.
AT_FDCWD = -100
RENAME_EXCHANGE = 2

logger = logging.getLogger(__name__)
_reported: set[Path] = set()
"""Files and folders that this process could not remove and has said so."""


def suggest_path(path: Path) -> str:
    """Return the nearest name to that of a missing file or folder, as the end of a message; empty if none is near."""
    path = path.absolute()
    # The part that is missing may be a folder on the way.
    missing = path
    while not missing.parent.is_dir():
        missing = missing.parent
    rest = path.relative_to(missing)
    try:
        names = sorted(os.listdir(missing.parent))  # noqa: PTH208  only names are needed
    except OSError:
        return ""
    # Without suffixes, which make any two names of one kind near. Names that lead to nothing suggest nothing.
    stems: dict[str, list[str]] = {}
    for name in names:
        stems.setdefault(Path(name).stem, []).append(name)
    near = [
        missing.parent / name / rest
        for stem in difflib.get_close_matches(missing.stem, stems, n=MAX_SUGGESTIONS)
        for name in sorted(stems[stem], key=lambda name: Path(name).suffix != missing.suffix)
        if (missing.parent / name / rest).exists()
    ]
    return f"; did you mean {near[0]}?" if near else ""


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
        remove(staging)


@contextmanager
def staging_dir(path: Path) -> Iterator[Path]:
    """Yield a new empty folder; let it replace `path` at the end of the block, remove it if the block fails."""
    _restore_previous(path)
    staging = staging_path(path)
    staging.mkdir(parents=True)
    try:
        yield staging
        replace_dir(staging, path)
    finally:
        remove(staging)


def replace_dir(source: Path, target: Path) -> None:
    """Rename a complete folder to `target`; a folder of that name is replaced, and removed as far as possible.

    Where the file system can swap two names (Linux's local ones can, NFS cannot), there is a complete folder at
    `target` at any moment. Elsewhere the old one steps aside for a moment; the next `staging_dir` of `target` brings it
    back if this process dies in between.
    """
    if not target.exists():
        source.rename(target)
        return

    previous = _previous_path(target)
    # Left by an earlier replacement that could not remove it.
    remove(previous)
    aside = staging_path(target) if previous.exists() else previous
    # Renaming the old folder works even if one of its files is open elsewhere, which keeps NFS from removing it.
    if _exchange(source, target):
        source.rename(aside)
    else:
        target.rename(aside)
        source.rename(target)
    remove(aside)


def remove(path: Path) -> bool:
    """Remove a file or folder as far as possible; a failure ends nothing and is logged once per process.

    What cannot be removed (on NFS, a folder with files that another process holds open; folders of another user) is
    left to the next attempt.

    Returns:
        Whether `path` is gone.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        # Another process may be removing it too.
        if _is_gone(path):
            return True
        if path not in _reported:
            _reported.add(path)
            logger.warning(
                "%s cannot be removed (%s); it is not needed any more: remove it by hand if it stays",
                path,
                error.strerror or error,
            )
        return False
    return True


def _is_gone(path: Path) -> bool:
    """Return whether there is no such file or folder; False if the file system cannot tell."""
    # Not `os.path.lexists`, which takes any error for absence: that of a stale NFS handle, for one.
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def _exchange(first: Path, second: Path) -> bool:
    """Swap the names of two files or folders at once; return False if the system cannot."""
    # renameat2(2) by way of ctypes: Python's os module has no call with flags. musl's older versions lack it.
    renameat2 = getattr(LIBC, "renameat2", None)
    if renameat2 is None:
        return False
    names = os.fsencode(first.absolute()), os.fsencode(second.absolute())
    return bool(renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0)


def _restore_previous(path: Path) -> None:
    """Bring back a folder that a process had moved aside when it died."""
    previous = _previous_path(path)
    if previous.is_dir() and not path.exists():
        previous.rename(path)


def _previous_path(path: Path) -> Path:
    return path.with_name(f".{path.name}{PREVIOUS_SUFFIX}")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file at once: readers see its old content or `content`. Text is encoded as UTF-8.

    The data is not forced to the disk: after a power failure the file may be the old one.
    """
    data = content.encode() if isinstance(content, str) else content
    with staged_file(path) as staging:
        staging.write_bytes(data)


def is_transfer_error(error: Exception) -> bool:
    """Return whether an error comes from a transfer to or from a server, and not from a fault in this program."""
    # fsspec raises ValueError for an unknown protocol and ImportError if a protocol's package is not installed. Some
    # packages have errors of their own that are no OSError, such as aiohttp's for a connection that was cut off.
    is_foreign = type(error).__module__.partition(".")[0] not in {"builtins", "ul2r"}
    return is_foreign or isinstance(error, OSError | ValueError | ImportError)


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
