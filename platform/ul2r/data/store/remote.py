"""Token stores that lie elsewhere (S3, GCS, HTTP, whatever fsspec knows): fetched once to a folder of this machine.

A fetched store is kept under its fingerprint, so that it is found again without asking, and another one never
mistaken for it.
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
from ul2r.filesystem import file_lock

CACHE_VARIABLE = "UL2R_CACHE"
"""Folder for fetched stores; without it, `ul2r` in the user's cache folder."""


def is_remote(store: str) -> bool:
    """Whether a store is named by a URL."""
    return "://" in store


def local_store(store: str, fingerprint: str | None = None) -> Path:
    """Folder of a store on this machine, which is fetched first where it lies elsewhere.

    Args:
        store: Folder or URL.
        fingerprint: Of the store, where it is known; one that was fetched before is then used without asking.

    Raises:
        CorpusError: If it cannot be fetched.
    """
    if not is_remote(store):
        return Path(store)
    if fingerprint is not None and (kept := _kept(fingerprint)).is_dir():
        return kept
    beside = Path(tempfile.mkdtemp(prefix="fetching-", dir=_cache()))
    try:
        _fetch(store, MANIFEST_FILE, beside)
        manifest = Manifest.read(beside)
        if not manifest.complete:
            raise CorpusError(
                f"{store}: is not complete yet: run jobs/prepare.py with its recipe first"
            )
        kept = _kept(manifest.fingerprint)
        with file_lock(
            kept
        ):  # processes of one machine that need it at the same time fetch it once
            if not kept.is_dir():
                for name in manifest.files:
                    _fetch(store, name, beside)
                beside.rename(kept)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return kept


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get(CACHE_VARIABLE) or Path(home) / "ul2r")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _kept(fingerprint: str) -> Path:
    return _cache() / f"store-{fingerprint[:32]}"


def _fetch(store: str, name: str, folder: Path) -> None:
    url = f"{store.rstrip('/')}/{name}"
    try:
        filesystem: Any
        filesystem, path = fsspec.core.url_to_fs(url)
        filesystem.get_file(path, str(folder / name))
    except FileNotFoundError:
        raise CorpusError(f"{url}: not there; a token store is what jobs/prepare.py made") from None
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CorpusError(f"{url}: cannot be fetched: {reason}") from None
