"""Which files a corpus is made of."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from ul2r.errors import CorpusError

STANDARD_LIBRARY = "stdlib"
NOT_LIBRARY = frozenset({"test", "tests", "idlelib", "site-packages"})
"""Folders of the installed library that hold tests, a program, or what others installed."""
ONE_DOCUMENT_SUFFIXES = (".txt", ".md", ".py")
TEXT_SUFFIXES = (*ONE_DOCUMENT_SUFFIXES, ".jsonl", ".parquet")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
TOKEN_SUFFIXES = (".bin", ".idx")


@dataclass(frozen=True)
class SourceFile:
    """A file of the corpus, as it was when listed, or a part of one."""

    path: Path
    """Absolute."""
    name: str
    """Path below the corpus entry that led to it: the same wherever that entry lies."""
    size: int
    """Bytes."""
    modified_ns: int
    begin: int = 0
    """Byte of the file that a part begins with."""

    @property
    def holds_tokens(self) -> bool:
        """Whether it is the `.bin` of a token store of Megatron's instead of text."""
        return self.path.suffix in TOKEN_SUFFIXES

    @property
    def can_be_cut(self) -> bool:
        """Whether parts of it can be read for themselves: lines that are found from any byte of the file."""
        return self.path.suffix == ".jsonl"

    def parts(self, size: int) -> list[SourceFile]:
        """The file cut into parts of about `size` bytes, as few as that takes; one if it cannot be cut."""
        count = -(-self.size // size) if self.can_be_cut and self.size else 1
        edges = [number * self.size // count for number in range(count + 1)]
        return [
            replace(self, begin=self.begin + begin, size=end - begin)
            for begin, end in pairwise(edges)
        ]


def find_files(entries: Sequence[str]) -> list[SourceFile]:
    """Files of a corpus in a fixed order: entries as given, files of a folder by name.

    Args:
        entries: Files, folders (searched in depth; hidden files and folders are passed over), or "stdlib".

    Raises:
        CorpusError: If an entry is missing or holds nothing readable.
    """
    return [file for entry in entries for file in _entry(entry)]


def _entry(entry: str) -> list[SourceFile]:
    if entry == STANDARD_LIBRARY:
        return _folder(Path(sysconfig.get_path("stdlib")), (".py",), NOT_LIBRARY)
    path = Path(entry).absolute()
    if path.is_dir():
        files = _folder(path, TEXT_SUFFIXES, frozenset())
        if not files:
            raise CorpusError(f"{entry}: no {_readable()} in this folder")
        return files
    if not path.exists():
        raise CorpusError(f"{entry}: no such file or folder; set data.corpus to your text")
    if path.suffix in TOKEN_SUFFIXES:
        return [_source(path.with_suffix(".bin"), path.parent)]
    if kind(path) not in TEXT_SUFFIXES:
        raise CorpusError(f"{entry}: cannot be read as a corpus; give {_readable()}")
    return [_source(path, path.parent)]


def _folder(root: Path, suffixes: Sequence[str], skipped: frozenset[str]) -> list[SourceFile]:
    found = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in skipped and not name.startswith(".")]
        paths = (Path(folder) / name for name in names if not name.startswith("."))
        found += [path for path in paths if kind(path) in suffixes and path.is_file()]
    return [_source(path, root) for path in sorted(found)]


def _source(path: Path, root: Path) -> SourceFile:
    if not path.is_file():
        raise CorpusError(f"{path}: missing")
    status = path.stat()
    name = path.relative_to(root).as_posix()
    return SourceFile(path, name, status.st_size, status.st_mtime_ns)


def kind(path: Path) -> str:
    """The suffix that says what is inside, below a compression's."""
    return path.with_suffix("").suffix if path.suffix in COMPRESSIONS else path.suffix


def _readable() -> str:
    return f"{', '.join(TEXT_SUFFIXES)} (each plain, {' or '.join(COMPRESSIONS)})"
