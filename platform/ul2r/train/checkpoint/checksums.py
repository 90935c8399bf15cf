"""Whether a checkpoint on disk is the one that was written: sizes and SHA-256 of its files, kept beside them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

DIGESTS_FILE = "digests.json"
FORMAT = 1
SMALL_BYTES = 2**20
"""Up to this size a file is always read, such as checkpoint.json."""


@dataclass(frozen=True)
class Digest:
    """Size and content of a file."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Digest:
        """Read a file."""
        with path.open("rb") as file:
            return cls(
                os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()
            )


def digest_files(paths: Iterable[Path]) -> dict[str, Digest]:
    """Digests of files by name, several read at the same time."""
    found = list(paths)
    with ThreadPoolExecutor(_threads()) as pool:
        return dict(zip((path.name for path in found), pool.map(Digest.of, found), strict=True))


def write_digests(folder: Path, known: Mapping[str, Digest]) -> int:
    """Write digests of all files of a checkpoint into its folder, the last thing that is written there.

    Args:
        folder: The checkpoint.
        known: Digests of some of its files by name, such as each rank made of those it wrote.

    Returns:
        Bytes of all its files.
    """
    others = [path for path in folder.iterdir() if path.name not in known]
    digests = {**known, **digest_files(others)}
    files = {name: asdict(digests[name]) for name in sorted(digests)}
    text = json.dumps({"format": FORMAT, "files": files}, indent=1)
    (folder / DIGESTS_FILE).write_text(text + "\n", encoding="utf-8")
    return sum(digest.bytes for digest in digests.values())


def find_damage(
    folder: Path, *, part: int = 0, parts: int = 1, thorough: bool = True
) -> str | None:
    """What is wrong with a finished checkpoint, in a few words; None if it is sound.

    Args:
        folder: The checkpoint.
        part: Which part of its files to look at, so that ranks can share the work.
        parts: Number of such parts.
        thorough: Whether to read all files; without, of large ones only the sizes are looked at.
    """
    if not folder.is_dir():
        return "is not there"
    try:
        files = _read_digests(folder)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"has no readable {DIGESTS_FILE} ({_reason(error)})"
    mine = list(files.items())[part::parts]
    for name, digest in mine:
        path = folder / name
        if not path.is_file():
            return f"lacks {name}"
        if path.stat().st_size != digest.bytes:
            return f"holds {path.stat().st_size:,} of {digest.bytes:,} bytes of {name}"
    read = [name for name, digest in mine if thorough or digest.bytes <= SMALL_BYTES]
    try:
        found = digest_files(folder / name for name in read)
    except OSError as error:
        return f"cannot be read ({_reason(error)})"
    changed = [name for name in read if found[name] != files[name]]
    return f"holds {changed[0]} with another SHA-256 than was written" if changed else None


def _read_digests(folder: Path) -> dict[str, Digest]:
    tree = json.loads((folder / DIGESTS_FILE).read_text(encoding="utf-8"))
    if tree["format"] != FORMAT:
        raise ValueError(f"format {tree['format']}, this version reads {FORMAT}")
    return {str(name): Digest(**fields) for name, fields in tree["files"].items()}


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


def _threads() -> int:
    return max(len(os.sched_getaffinity(0)), 1)
