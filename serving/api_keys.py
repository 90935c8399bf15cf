"""Bearer keys from a file, which is read again whenever it changes."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import stat
from pathlib import Path

from ul2r.errors import ServiceError

logger = logging.getLogger("ul2r.serving")

SCHEME = "bearer "
MIN_KEY_CHARACTERS = 8


class ApiKeys:
    """Keys of a file, one a line; empty lines and those that begin with # are left out.

    A changed file counts from the next request on: to rotate keys, add the new one, and remove the old one later. A
    file that is gone or holds a mistake lets nobody in, since a key that was to be removed must not go on working.

    Args:
        path: The file.

    Raises:
        ServiceError: If the file cannot be read, or has no key or one that is too short.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._version = _find_version(path)
        self._digests = read_digests(path)
        if path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
            # No error: Kubernetes mounts secrets in this way by default.
            logger.warning("%s can be read by other users: chmod 600 %s", path, path)

    def identify(self, authorization: str) -> str | None:
        """Return a short name of the key in an Authorization header, or None if it is none of the keys.

        The name is the beginning of the key's SHA-256: it tells keys apart in a log and opens nothing.

        Raises:
            ServiceError: If the file cannot be read any more.
        """
        self._refresh()
        if authorization[: len(SCHEME)].lower() != SCHEME:
            return None
        # Digests have one length, and every key is compared to its end: the time tells nothing about the keys.
        digest = _digest(authorization[len(SCHEME) :].strip())
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return digest.hex()[:8] if any(matches) else None

    def _refresh(self) -> None:
        version = _find_version(self._path)
        if version == self._version:
            if not self._digests:
                raise ServiceError(f"the keys in {self._path} cannot be read")
            return
        # Before it is read: what fails once is not logged with every request.
        self._version = version
        self._digests = ()
        try:
            self._digests = read_digests(self._path)
        except ServiceError as error:
            logger.error("%s: all requests are refused until it is fixed", error)  # noqa: TRY400  one line is enough
            raise
        logger.info("%s: read again, %d keys", self._path, len(self._digests))


def _find_version(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    # The time of the last change of any kind, too: `cp -p` keeps the other one, and so does a chmod that mends a file.
    return (status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino)


def read_digests(path: Path) -> tuple[bytes, ...]:
    """Return the digests of a file's keys.

    Raises:
        ServiceError: If the file cannot be read, or has no key or one that is too short.
    """
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise ServiceError(f"the keys in {path} cannot be read ({reason})") from error
    except UnicodeDecodeError as error:
        raise ServiceError(f"{path}: keys are letters, digits and signs of ASCII") from error

    stripped = [line.strip() for line in lines]
    keys = [line for line in stripped if line and not line.startswith("#")]
    if not keys:
        raise ServiceError(f"{path} has no key: write one a line")
    # The key itself is not shown.
    short = [number for number, key in enumerate(keys, start=1) if len(key) < MIN_KEY_CHARACTERS]
    if short:
        raise ServiceError(
            f"{path}: key {short[0]} has fewer than {MIN_KEY_CHARACTERS} characters: make one with "
            "`openssl rand -hex 24`"
        )
    return tuple(_digest(key) for key in keys)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
