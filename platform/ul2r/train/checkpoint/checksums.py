"""Verification of checkpoints: the size and SHA-256 of every file, written when the checkpoint is.

A checkpoint is verified before it is used (`storage.first_valid`). A driver that checks a run compares sizes; then the
ranks read all files, each its part (`Checkpointer.latest_valid`).

digests.json: {"format": 1, "files": {name: {"bytes": size, "sha256": hexadecimal}}}
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from ul2r.filesystem import sha256_of
from ul2r.paths import is_file_name
from ul2r.train.checkpoint.layout import DIGESTS_FILE

FORMAT = 1
SMALL_BYTES = 2**20
"""Files up to this size, such as checkpoint.json, are always read."""
# A damaged file may be no JSON, or JSON of any shape.
UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError)


@dataclass(frozen=True)
class FileDigest:
    """Size and content of a file.

    Attributes:
        bytes: Size.
        sha256: Digest of the content in hexadecimal.
    """

    bytes: int
    sha256: str

    @classmethod
    def from_file(cls, path: Path) -> FileDigest:
        """Read a file."""
        return cls(path.stat().st_size, sha256_of(path))


def digest_files(paths: Iterable[Path]) -> dict[str, FileDigest]:
    """Return digests of files by name, read in parallel."""
    listed = list(paths)
    # hashlib releases the GIL while it hashes: one thread per core is as fast as one process per core.
    with ThreadPoolExecutor(_num_cores()) as pool:
        digests = pool.map(FileDigest.from_file, listed)
        return dict(zip((path.name for path in listed), digests, strict=True))


def write_digests(folder: Path, known: Mapping[str, FileDigest]) -> int:
    """Write the digests of all files of a checkpoint into its folder; this must be the last file written there.

    Args:
        folder: The checkpoint.
        known: Digests of some of its files by name, such as those that each rank computed of its own files.

    Returns:
        Size of all files in bytes.
    """
    # The others are small: metadata that rank 0 wrote after all ranks had written their files.
    others = [path for path in folder.iterdir() if path.name not in known]
    digests = {**known, **digest_files(others)}
    files = {name: asdict(digests[name]) for name in sorted(digests)}
    # Not written atomically: the folder is still a staging folder, which is renamed as a whole.
    text = json.dumps({"format": FORMAT, "files": files}, indent=1)
    (folder / DIGESTS_FILE).write_text(text + "\n", encoding="utf-8")
    return sum(digest.bytes for digest in digests.values())


def find_damage(
    folder: Path, *, part: int = 0, num_parts: int = 1, thorough: bool = True
) -> str | None:
    """Verify a finished checkpoint; return a short description of its damage, None if it is valid.

    Args:
        folder: The checkpoint.
        part: Part of its files to verify, so that ranks can share the work.
        num_parts: Number of such parts.
        thorough: Whether to read all files; if False, only the sizes of large files are checked.
    """
    if not folder.is_dir():
        return "does not exist"
    try:
        files = _read_digests(folder)
    except UNREADABLE as error:
        return f"has no readable {DIGESTS_FILE} ({_describe(error)})"

    # Round robin: neighbors in the sorted list are files of the same rank.
    own = list(files.items())[part::num_parts]
    # Sizes of all files first: a truncated file is found without reading gigabytes.
    for name, digest in own:
        path = folder / name
        if not path.is_file():
            return f"lacks {name}"
        if path.stat().st_size != digest.bytes:
            return f"has {path.stat().st_size:,} of {digest.bytes:,} bytes of {name}"

    to_read = [name for name, digest in own if thorough or digest.bytes <= SMALL_BYTES]
    try:
        found = digest_files(folder / name for name in to_read)
    except OSError as error:
        return f"cannot be read ({_describe(error)})"
    changed = [name for name in to_read if found[name] != files[name]]
    return f"has a {changed[0]} whose SHA-256 is not the one written" if changed else None


def list_files(folder: Path) -> list[str]:
    """Return the names of a checkpoint's files according to its digests; none if they cannot be read."""
    try:
        return list(_read_digests(folder))
    except UNREADABLE:
        return []


def _read_digests(folder: Path) -> dict[str, FileDigest]:
    tree = json.loads((folder / DIGESTS_FILE).read_text(encoding="utf-8"))
    if tree["format"] != FORMAT:
        raise ValueError(f"format {tree['format']}, this version reads {FORMAT}")
    for name in tree["files"]:
        # A remote copy must not choose what is read and where it is written.
        if not is_file_name(name):
            raise ValueError(f"names {name!r}, which is not a file of the checkpoint")
    return {str(name): FileDigest(**fields) for name, fields in tree["files"].items()}


def _describe(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


def _num_cores() -> int:
    # The affinity and not os.cpu_count(): Slurm and containers give a process some of the machine's cores.
    return max(len(os.sched_getaffinity(0)), 1)
