"""Files that a corpus consists of."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from ul2r.errors import CorpusError

STANDARD_LIBRARY = "stdlib"
SKIPPED_LIBRARY_FOLDERS = frozenset({"test", "tests", "idlelib", "site-packages"})
"""Folders of the installed standard library with tests, a program, or third-party packages."""
ONE_DOCUMENT_SUFFIXES = (".txt", ".md", ".py")
TEXT_SUFFIXES = (*ONE_DOCUMENT_SUFFIXES, ".jsonl", ".parquet")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
TOKEN_SUFFIXES = (".bin", ".idx")


@dataclass(frozen=True)
class SourceFile:
    """A file of the corpus as it was when listed, or a part of it.

    Attributes:
        path: Absolute path.
        name: Path below the corpus entry that led to it: the same wherever that entry lies.
        size: Bytes.
        modified_ns: Time of the last modification.
        begin: First byte of the part.
    """

    path: Path
    name: str
    size: int
    modified_ns: int
    begin: int = 0

    @property
    def holds_tokens(self) -> bool:
        """True for the `.bin` file of a Megatron token store, False for text."""
        return self.path.suffix in TOKEN_SUFFIXES

    @property
    def is_splittable(self) -> bool:
        """True if parts can be read independently: the next line can be found from any byte of the file."""
        return self.path.suffix == ".jsonl"

    def split(self, size: int) -> list[SourceFile]:
        """Split the file into the fewest parts of about `size` bytes; an unsplittable file is one part."""
        # Rounded up, and edges in proportion instead of multiples of `size`: no small part is left over at the end.
        count = -(-self.size // size) if self.is_splittable and self.size else 1
        edges = [number * self.size // count for number in range(count + 1)]
        return [
            replace(self, begin=self.begin + begin, size=end - begin)
            for begin, end in pairwise(edges)
        ]


def find_files(entries: Sequence[str]) -> list[SourceFile]:
    """List the files of a corpus in a fixed order: entries as given, files of a folder by name.

    Args:
        entries: Files, folders (searched recursively; hidden files and folders are skipped), or "stdlib".

    Raises:
        CorpusError: If an entry is missing or holds nothing readable.
    """
    return [file for entry in entries for file in _find_entry_files(entry)]


def text_suffix(path: Path) -> str:
    """Return the suffix that tells the content, without that of a compression."""
    return path.with_suffix("").suffix if path.suffix in COMPRESSIONS else path.suffix


def _find_entry_files(entry: str) -> list[SourceFile]:
    if entry == STANDARD_LIBRARY:
        return _walk_folder(Path(sysconfig.get_path("stdlib")), (".py",), SKIPPED_LIBRARY_FOLDERS)

    path = Path(entry).absolute()
    if path.is_dir():
        files = _walk_folder(path, TEXT_SUFFIXES, frozenset())
        if not files:
            raise CorpusError(f"{entry}: this folder has no {_readable_suffixes()}")
        return files
    if not path.exists():
        raise CorpusError(f"{entry}: no such file or folder: set data.corpus to your text")
    # Either file names the pair; the .bin file stands for it, since its size is that of the tokens.
    if path.suffix in TOKEN_SUFFIXES:
        return [_describe_file(path.with_suffix(".bin"), path.parent)]
    if text_suffix(path) not in TEXT_SUFFIXES:
        raise CorpusError(f"{entry}: unsupported corpus file: use {_readable_suffixes()}")
    return [_describe_file(path, path.parent)]


def _walk_folder(root: Path, suffixes: Sequence[str], skipped: frozenset[str]) -> list[SourceFile]:
    found = []
    for folder, subfolders, names in os.walk(root):
        # In place: os.walk descends into what is left of this list.
        subfolders[:] = [
            name for name in subfolders if name not in skipped and not name.startswith(".")
        ]
        paths = (Path(folder) / name for name in names if not name.startswith("."))
        found += [path for path in paths if text_suffix(path) in suffixes and path.is_file()]
    # os.walk follows the order of the file system, which differs between machines.
    return [_describe_file(path, root) for path in sorted(found)]


def _describe_file(path: Path, root: Path) -> SourceFile:
    if not path.is_file():
        raise CorpusError(f"{path}: missing")
    status = path.stat()
    name = path.relative_to(root).as_posix()
    return SourceFile(path, name, status.st_size, status.st_mtime_ns)


def _readable_suffixes() -> str:
    return f"{', '.join(TEXT_SUFFIXES)} (each plain, {' or '.join(COMPRESSIONS)})"
