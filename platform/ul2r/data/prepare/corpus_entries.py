"""Entries of `data.corpus`: the paths that each of them names."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from ul2r.data.store.token_store import append_suffix
from ul2r.errors import CorpusError
from ul2r.filesystem import suggest_path


def find_entry_paths(entry: str, key: str = "data.corpus") -> tuple[list[Path], bool]:
    """Return the absolute paths of an entry, and whether the entry is a pattern.

    Args:
        entry: A file or folder, a file:// URL of one, a pattern, or the prefix of a Megatron token store: `x` for
            `x.bin` and `x.idx`, as Megatron's own tools name it.
        key: The setting or argument that has the entry, for messages.

    Raises:
        CorpusError: If there is nothing there.
    """
    # An empty path is the working directory, which nobody means.
    if not entry.strip():
        raise CorpusError(f"{key} has an empty entry: name a file or folder, or remove it")

    name = os.path.expanduser(_resolve_url(entry, key))  # noqa: PTH111  `Path.expanduser` raises for an unknown ~user
    # glob raises for such a name, which no file can have.
    if "\0" in name:
        raise CorpusError(f"{entry!r}: no such file or folder: set {key} to your text")
    path = Path(name).absolute()
    try:
        if path.exists():
            return [path], False
        prefixed = append_suffix(path, ".bin")
        if prefixed.exists() or append_suffix(path, ".idx").exists():
            return [prefixed], False
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise CorpusError(f"{entry}: cannot be read: {error.strerror}") from None

    if glob.has_magic(name):
        # Sorted, since the order of a file system differs between machines.
        matches = sorted(glob.glob(name, recursive=True))  # noqa: PTH207  `Path.glob` takes no absolute pattern
        paths = [Path(match).absolute() for match in matches]
        if paths:
            return paths, True
        raise CorpusError(f"{entry}: no file matches this pattern: set {key} to your text")
    raise CorpusError(
        f"{entry}: no such file or folder{suggest_path(path) or f': set {key} to your text'}"
    )


def _resolve_url(entry: str, key: str) -> str:
    """Return the path of a file:// URL, and anything that is not a URL unchanged."""
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", entry):
        return entry
    try:
        url = urlsplit(entry)
    except ValueError as error:  # a bracket, as around an IPv6 address, without its other half
        raise CorpusError(f"{entry}: not a URL: {error}: name a file or folder") from None
    if url.scheme.lower() == "file" and url.netloc in ("", "localhost"):
        return url2pathname(url.path)
    raise CorpusError(
        f"{entry}: {key} takes files and folders: copy the text to a file system that every machine sees, or "
        "mount it there"
    )
