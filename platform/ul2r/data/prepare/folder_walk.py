"""Text files in a folder and below it, in an order that does not depend on the file system."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ul2r.data.prepare.left_out import LeftOut
from ul2r.data.prepare.suffixes import (
    COMPRESSIONS,
    TEXT_SUFFIXES,
    TOKEN_SUFFIXES,
    is_read_if_named,
    text_suffix,
)
from ul2r.errors import CorpusError

SKIPPED_LIBRARY_FOLDERS = frozenset({"test", "tests", "idlelib", "site-packages"})
"""Folders of the installed standard library with tests, a program, or third-party packages."""


@dataclass(frozen=True)
class FoundFile:
    """A text file or token store of the corpus.

    Attributes:
        path: Absolute path.
        name: Path below the corpus entry.
        size: Bytes.
        modified_ns: Time of the last modification.
        identity: Equal for two paths of one file.
        is_linked: Whether the path leads through a link.
        was_listed: Whether earlier versions found it.
        is_read: False for a file that is read only if an entry of its own names it.
    """

    path: Path
    name: str
    size: int
    modified_ns: int
    identity: str
    is_linked: bool = False
    was_listed: bool = True
    is_read: bool = True

    @classmethod
    def describe(
        cls,
        path: Path,
        root: Path,
        *,
        real_path: str = "",
        is_linked: bool = False,
        is_read: bool = True,
    ) -> FoundFile:
        """Describe an existing file below the entry `root`.

        Args:
            path: Absolute path.
            root: The entry, or the folder of an entry that is a file.
            real_path: The path without links, if the caller knows that the last part is none.
            is_linked: Whether the path leads through a linked folder.
            is_read: See `FoundFile`.

        Raises:
            CorpusError: If it cannot be read.
        """
        try:
            status = path.stat()
            is_link = not real_path and path.is_symlink()
            # The .bin file stands for both halves of a token store.
            if path.suffix == ".idx" and path.with_suffix(".bin").is_file():
                real_path = os.path.realpath(path.with_suffix(".bin"))
            # A path and not always the inode, which some network file systems do not keep; one with hard links does.
            elif status.st_nlink > 1:
                real_path = f"inode {status.st_dev} {status.st_ino}"
            identity = real_path or os.path.realpath(path)
        except OSError as error:
            raise CorpusError(f"{path}: cannot be read: {error.strerror}") from None
        return cls(
            path=path,
            name=path.relative_to(root).as_posix(),
            size=status.st_size,
            modified_ns=status.st_mtime_ns,
            identity=identity,
            is_linked=is_linked or is_link,
            was_listed=not is_linked and _has_earlier_suffix(path),
            is_read=is_read,
        )


def list_library(root: Path) -> list[FoundFile]:
    """Return the modules of the standard library in `root`, without tests and third-party packages."""
    found = []
    for folder, subfolders, names in os.walk(root):
        # In place: os.walk descends into what is left of this list.
        subfolders[:] = [
            name
            for name in subfolders
            if name not in SKIPPED_LIBRARY_FOLDERS and not name.startswith(".")
        ]
        paths = (Path(folder) / name for name in names if not name.startswith("."))
        found += [path for path in paths if path.suffix == ".py" and path.is_file()]
    return [FoundFile.describe(path, root) for path in sorted(found)]


def walk_folder(root: Path, left_out: LeftOut) -> list[FoundFile]:
    """Return the text files in a folder and below it, sorted by path, and those that could be named; follow links.

    Args:
        root: The folder.
        left_out: Output: counts what is hidden or has another suffix.

    Raises:
        CorpusError: If a folder or file cannot be read.
    """
    walk = _FolderWalk(root, left_out)
    return sorted(walk.find(), key=lambda file: file.path)


class _FolderWalk:
    """Visits every folder below `root` once, links last: what can be reached without one has no other name."""

    def __init__(self, root: Path, left_out: LeftOut) -> None:
        self._root = root
        self._left_out = left_out
        self._found: list[FoundFile] = []
        self._visited: set[str] = set()
        self._links: list[Path] = []

    def find(self) -> list[FoundFile]:
        self._visit(self._root, is_linked=False)
        # Grows while it is walked: linked folders may hold further links.
        for link in self._links:
            self._visit(link, is_linked=True)
        return self._found

    def _visit(self, top: Path, *, is_linked: bool) -> None:
        # A stack and no recursion, which would be as deep as the folders are.
        pending = [top]
        while pending:
            folder = pending.pop()
            real = os.path.realpath(folder)
            # Links may lead back to a folder above, or two of them to one folder.
            if real in self._visited:
                self._left_out.add("linked folders read already", 0, str(folder))
                continue
            self._visited.add(real)
            subfolders = [
                Path(entry.path)
                for entry in _list_folder(folder)
                if self._take(entry, real, is_linked=is_linked)
            ]
            pending += reversed(subfolders)

    def _take(self, entry: os.DirEntry[str], real_folder: str, *, is_linked: bool) -> bool:
        """Take a file, note a link to a folder, count anything else; return whether to visit the entry now."""
        path = Path(entry.path)
        is_link = entry.is_symlink()
        is_hidden = entry.name.startswith(".")
        if _is_kind(entry, entry.is_dir):
            if is_hidden:
                self._left_out.add("hidden folders", 0, entry.path)
            elif is_link:
                self._links.append(path)
            return not (is_hidden or is_link)

        if not _is_kind(entry, entry.is_file):
            # Of a link that leads nowhere as well as of a socket.
            self._left_out.add("broken links and special files", 0, entry.path)
        elif is_hidden:
            self._left_out.add("hidden files", _size_of(entry), entry.path)
        elif (is_text := text_suffix(path) in TEXT_SUFFIXES) or is_read_if_named(path):
            # The folder's is known without links, so that few files need the system for their own.
            real_path = "" if is_link else os.path.join(real_folder, entry.name)  # noqa: PTH118  for each file
            found = FoundFile.describe(
                path, self._root, real_path=real_path, is_linked=is_linked, is_read=is_text
            )
            self._found.append(found)
        else:
            self._left_out.add_file(path, _size_of(entry))
        return False


def _is_kind(entry: os.DirEntry[str], is_kind: Callable[[], bool]) -> bool:
    try:
        return is_kind()
    except OSError as error:
        # A link to itself, or to where nobody may look.
        if entry.is_symlink():
            return False
        raise CorpusError(f"{entry.path}: cannot be read: {error.strerror}") from None


def _list_folder(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise CorpusError(f"{folder}: cannot be read: {error.strerror}") from None


def _size_of(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError as error:
        raise CorpusError(f"{entry.path}: cannot be read: {error.strerror}") from None


def _has_earlier_suffix(path: Path) -> bool:
    """Return whether earlier versions read the file: they knew suffixes in small letters only."""
    name = path.with_suffix("") if path.suffix in COMPRESSIONS else path
    return name.suffix in (*TEXT_SUFFIXES, *TOKEN_SUFFIXES)
