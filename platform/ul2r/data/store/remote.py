"""Remote token stores (S3, GCS, HTTP, anything fsspec knows): downloaded once to a local cache.

A downloaded store is cached under its fingerprint: it is found again without a request, and never mistaken for
another one.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import fsspec

from ul2r.data.store.manifest import MANIFEST_FILE, Manifest
from ul2r.errors import CorpusError
from ul2r.filesystem import file_lock, staging_dir

CACHE_VARIABLE = "UL2R_CACHE"
"""Environment variable with the folder for downloaded stores; the default is `ul2r` in the user's cache folder."""


def is_remote(store: str) -> bool:
    """Return whether a store is named by a URL."""
    return "://" in store


def fetch_store(store: str, fingerprint: str | None = None) -> Path:
    """Return the local folder of a store; download it first if it is remote and not cached.

    Args:
        store: Folder or URL.
        fingerprint: Fingerprint of the store if known; a cached copy is then used without a request.

    Raises:
        CorpusError: If it cannot be downloaded.
    """
    if not is_remote(store):
        return Path(store)
    if fingerprint is not None and (cached := _cached_store(fingerprint)).is_dir():
        return cached

    with tempfile.TemporaryDirectory() as folder:
        # The manifest alone, and first: its fingerprint tells whether the rest is in the cache.
        manifest_file = _download(store, MANIFEST_FILE, Path(folder))
        manifest = Manifest.read(Path(folder))
        if not manifest.is_complete:
            raise CorpusError(
                f"{store}: not complete yet: run jobs/prepare.py with its recipe first"
            )

        cached = _cached_store(manifest.fingerprint)
        # Several processes of a machine may need the store at once; the first one downloads it.
        with file_lock(cached):
            # Looked for again under the lock: another process may have finished while this one waited.
            if not cached.is_dir():
                with staging_dir(cached) as staging:
                    shutil.copyfile(manifest_file, staging / MANIFEST_FILE)
                    for name in manifest.files:
                        _download(store, name, staging)
    return cached


def _cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get(CACHE_VARIABLE) or Path(home) / "ul2r")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _cached_store(fingerprint: str) -> Path:
    return _cache_folder() / f"store-{fingerprint[:32]}"


def _download(store: str, name: str, folder: Path) -> Path:
    url = f"{store.rstrip('/')}/{name}"
    try:
        filesystem: Any
        # The protocol selects the package (s3fs, gcsfs, ...), which takes its credentials from the environment.
        filesystem, path = fsspec.core.url_to_fs(url)
        filesystem.get_file(path, str(folder / name))
    except FileNotFoundError:
        raise CorpusError(
            f"{url}: not found; give the URL of a folder that jobs/prepare.py wrote"
        ) from None
    # fsspec raises ValueError for an unknown protocol and ImportError if a protocol's package is not installed.
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CorpusError(f"{url}: download failed: {reason}") from None
    return folder / name
