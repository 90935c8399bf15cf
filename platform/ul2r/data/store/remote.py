"""Remote token stores (S3, GCS, HTTP, anything fsspec knows): downloaded once to a local cache, and verified.

A downloaded store is cached under its fingerprint: it is found again without a request, and never mistaken for
another one. A file gets its name in the cache only if its SHA-256 is the one in the store's manifest.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import fsspec

from ul2r.data.store.manifest import BLEND_KEY, MANIFEST_FILE, Manifest
from ul2r.errors import CorpusError
from ul2r.filesystem import (
    STAGING_SUFFIX,
    file_lock,
    is_transfer_error,
    remove,
    sha256_of,
    staging_dir,
)

CACHE_VARIABLE = "UL2R_CACHE"
"""Environment variable with the folder for downloaded stores; the default is `ul2r` in the user's cache folder."""
NUM_ATTEMPTS = 2
"""Attempts at a file: a transfer that was cut off or damaged on the way succeeds the second time."""

logger = logging.getLogger(__name__)


def is_remote(store: str) -> bool:
    """Return whether a store is named by a URL."""
    return "://" in store


def fetch_store(store: str, fingerprint: str | None = None) -> Path:
    """Return the local folder of a store; download it first if it is remote and not cached.

    Args:
        store: Folder or URL.
        fingerprint: Fingerprint of the store if known; a cached copy is then used without a request.

    Raises:
        CorpusError: If it cannot be downloaded, is incomplete, a blend or not the expected store, or if a file is not
            the one that its manifest describes.
    """
    if not is_remote(store):
        return Path(store)
    if fingerprint is not None and (cached := _cached_store(fingerprint)).is_dir():
        return cached

    # Errors of its removal are ignored: they would end a job that has all it needs.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        # The manifest alone, and first: its fingerprint tells whether the rest is in the cache.
        manifest_file = _download(store, MANIFEST_FILE, Path(folder))
        manifest = Manifest.read(Path(folder), store)
        _check_manifest(store, manifest, fingerprint)

        cached = _cached_store(manifest.fingerprint)
        # Several processes of a machine may need the store at once; the first one downloads it.
        with file_lock(cached):
            # Looked for again under the lock: another process may have finished while this one waited.
            if not cached.is_dir():
                # Of downloads that were killed: this process holds the lock, so nobody writes to them.
                for leftover in cached.parent.glob(f".{cached.name}.*{STAGING_SUFFIX}"):
                    remove(leftover)
                with staging_dir(cached) as staging:
                    shutil.copyfile(manifest_file, staging / MANIFEST_FILE)
                    for name, digest in manifest.files.items():
                        _fetch_file(store, name, digest, staging)
    return cached


def _check_manifest(store: str, manifest: Manifest, fingerprint: str | None) -> None:
    if BLEND_KEY in manifest.inputs:
        # Its stores are folders and URLs as the machine saw them that blended them.
        raise CorpusError(f"data.blend: {store} is itself a blend: list its stores instead")
    if not manifest.is_complete:
        raise CorpusError(f"{store}: not complete yet: run `ul2r prepare` with its recipe first")
    if fingerprint is not None and manifest.fingerprint != fingerprint:
        raise CorpusError(
            f"{store}: was replaced after it was blended (fingerprint {fingerprint[:8]} before, "
            f"{manifest.fingerprint[:8]} now): delete the blend's folder and run `ul2r prepare RECIPE` again, for "
            "new runs"
        )


def _cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get(CACHE_VARIABLE) or Path(home) / "ul2r")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _cached_store(fingerprint: str) -> Path:
    return _cache_folder() / f"store-{fingerprint[:32]}"


def _fetch_file(store: str, name: str, expected: str, folder: Path) -> None:
    """Download a file of a store; a transfer that was cut off or damaged is repeated."""
    for attempt in range(1, NUM_ATTEMPTS + 1):
        try:
            _download_verified(store, name, expected, folder)
        except CorpusError as error:
            if attempt == NUM_ATTEMPTS:
                raise
            logger.warning("%s: trying again", error)
        else:
            return


def _download_verified(store: str, name: str, expected: str, folder: Path) -> None:
    """Download a file of a store; it stays only if its SHA-256 is the expected one."""
    path = _download(store, name, folder)
    found = sha256_of(path)
    if found != expected:
        remove(path)
        raise CorpusError(
            f"{store.rstrip('/')}/{name}: its SHA-256 is {found}, but {expected} in {MANIFEST_FILE}: the file is "
            "damaged or was replaced: copy the store there again"
        )


def _download(store: str, name: str, folder: Path) -> Path:
    url = f"{store.rstrip('/')}/{name}"
    try:
        filesystem: Any
        # The protocol selects the package (s3fs, gcsfs, ...), which takes its credentials from the environment.
        filesystem, path = fsspec.core.url_to_fs(url)
        filesystem.get_file(path, str(folder / name))
    except FileNotFoundError:
        raise CorpusError(
            f"{url}: not found; give the URL of a folder that `ul2r prepare` wrote"
        ) from None
    except Exception as error:
        if not is_transfer_error(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CorpusError(f"{url}: download failed: {reason}") from error
    return folder / name
