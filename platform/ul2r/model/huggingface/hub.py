"""Downloads from the Hugging Face Hub, verified.

huggingface_hub compares the size of a file that it has downloaded. In its cache a file is called by what the Hub states
as its ETag: the SHA-256 of a large file, git's SHA-1 of a small one (huggingface_hub 1 and 2, "blobs").
"""

from __future__ import annotations

import hashlib
import re
import socket
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from ul2r.errors import CheckpointError
from ul2r.filesystem import remove, sha256_of, write_atomically

SHA256 = re.compile(r"[0-9a-f]{64}")
VERIFIED_FILE = "ul2r_verified.txt"
"""File in a model's folder of the cache: names of the blobs that were verified, or there before, one per line."""
CONNECTION_TIMEOUT_S = 10.0
GIT_SHA1 = re.compile(r"[0-9a-f]{40}")


def download_model(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """Return the local folder of a model's files, downloaded if they are not in the cache.

    Files that were verified before, or in the cache before this function was used, are not read again.

    Args:
        name: Name on the Hub.
        revision: Branch, tag or commit; by default the main branch.
        patterns: Names of the files to download.

    Raises:
        CheckpointError: If a file is not the one that the Hub names.
        ConnectionError: If the model is not in the cache, and the Hub cannot be reached.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"))
    # Its retries take minutes; what is in the cache needs no connection.
    if not constants.HF_HUB_OFFLINE and not (cache / "snapshots").exists():
        _check_connection(constants.ENDPOINT)
    before = {path.name for path in _list_blobs(cache)}
    if (cache / VERIFIED_FILE).exists():
        before &= _read_verified(cache)
    else:
        # In a cache that others made, nothing is read again.
        _write_verified(cache, before)
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    finally:
        # Also after an error: what a part of a download has brought is in the cache next time.
        new = [path for path in _list_blobs(cache) if path.name not in before]
        damaged = [path for path in new if not _is_intact(path)]
        for path in damaged:
            remove(path)
        verified = {path.name for path in new if path not in damaged}
        if verified:
            _write_verified(cache, before | verified)
        elif not cache.joinpath("refs").exists() and not cache.joinpath("blobs").exists():
            # The Hub has no such model: leave no folder for it.
            with suppress(OSError):
                (cache / VERIFIED_FILE).unlink()
                cache.rmdir()

    if damaged:
        names = {path.resolve().name: path.name for path in folder.iterdir()}
        first = damaged[0].name
        raise CheckpointError(
            f"base.hf={name}: {names.get(first, 'a file')} as downloaded does not have the digest that the Hub states, "
            f"{first}: it was removed; run the same command again"
        )
    return folder


def _check_connection(address: str) -> None:
    """Raise a ConnectionError if nothing listens at an address; through a proxy only the Hub's client can tell."""
    if urllib.request.getproxies():
        return
    url = urlsplit(address)
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        socket.create_connection((url.hostname or "", port), CONNECTION_TIMEOUT_S).close()
    except OSError as error:
        raise ConnectionError(f"no connection to {address}: {error}") from None


def _list_blobs(cache: Path) -> list[Path]:
    folder = cache / "blobs"
    # Unfinished downloads, which end in ".incomplete", may be another process's.
    return sorted(path for path in folder.iterdir() if not path.suffix) if folder.is_dir() else []


def _read_verified(cache: Path) -> set[str]:
    return set((cache / VERIFIED_FILE).read_text(encoding="utf-8").split())


def _write_verified(cache: Path, names: set[str]) -> None:
    # A cache that is read-only gets no new blobs either.
    with suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
        write_atomically(cache / VERIFIED_FILE, "".join(f"{name}\n" for name in sorted(names)))


def _is_intact(path: Path) -> bool:
    """Return whether a file in the cache has the digest that it is named by; true if its name is no digest."""
    if SHA256.fullmatch(path.name):
        return sha256_of(path) == path.name
    if GIT_SHA1.fullmatch(path.name):
        content = path.read_bytes()
        header = f"blob {len(content)}\0".encode()
        return hashlib.sha1(header + content, usedforsecurity=False).hexdigest() == path.name
    # A mirror of the Hub may have ETags of its own.
    return True
