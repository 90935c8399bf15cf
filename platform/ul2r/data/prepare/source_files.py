"""Files that a corpus consists of."""

from __future__ import annotations

import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

from ul2r.data.prepare.corpus_entries import find_entry_paths
from ul2r.data.prepare.folder_walk import FoundFile, list_library, walk_folder
from ul2r.data.prepare.left_out import LeftOut
from ul2r.data.prepare.suffixes import (
    NAMED_TEXT_SUFFIXES,
    SPLITTABLE_SUFFIXES,
    TEXT_SUFFIXES,
    TOKEN_SUFFIXES,
    describe_suffixes,
    text_suffix,
)
from ul2r.errors import CorpusError

STANDARD_LIBRARY = "stdlib"


@dataclass(frozen=True)
class SourceFile:
    """A file of the corpus as it was when listed, or a part of it.

    Attributes:
        path: Absolute path.
        name: Path below the corpus entry that led to it: the same wherever that entry lies.
        size: Bytes.
        modified_ns: Time of the last modification.
        begin: First byte of the part.
        text_key: Key or column that holds the text of a record.
        null_text: Whether records without a text are refused, or skipped and counted.
    """

    path: Path
    name: str
    size: int
    modified_ns: int
    begin: int = 0
    text_key: str = "text"
    null_text: Literal["refuse", "skip"] = "refuse"

    @property
    def holds_tokens(self) -> bool:
        """True for the `.bin` file of a Megatron token store, False for text."""
        return self.path.suffix in TOKEN_SUFFIXES

    @property
    def is_splittable(self) -> bool:
        """True if parts can be read independently: the next line can be found from any byte of the file."""
        return self.path.suffix.lower() in SPLITTABLE_SUFFIXES

    def split(self, size: int) -> list[SourceFile]:
        """Split the file into the fewest parts of about `size` bytes; an unsplittable file is one part."""
        # Rounded up, and edges in proportion instead of multiples of `size`: no small part is left over at the end.
        count = -(-self.size // size) if self.is_splittable and self.size else 1
        edges = [number * self.size // count for number in range(count + 1)]
        return [
            replace(self, begin=self.begin + begin, size=end - begin)
            for begin, end in pairwise(edges)
        ]


@dataclass(frozen=True)
class CorpusListing:
    """The files of a corpus.

    Attributes:
        files: Each file once, in a fixed order: entries as given, files of a folder by name.
        earlier_files: Files as earlier versions listed them, without linked folders and suffixes in capitals, and as
            often as they were named: stores made from them are still good.
        left_out: What was found but is not read.
    """

    files: tuple[SourceFile, ...]
    earlier_files: tuple[SourceFile, ...]
    left_out: LeftOut = field(default_factory=LeftOut)


def find_files(
    entries: Sequence[str], text_key: str = "text", null_text: Literal["refuse", "skip"] = "refuse"
) -> list[SourceFile]:
    """List the files of a corpus, see `list_corpus`."""
    return list(list_corpus(entries, text_key, null_text).files)


def list_corpus(
    entries: Sequence[str],
    text_key: str = "text",
    null_text: Literal["refuse", "skip"] = "refuse",
    setting: str = "data.corpus",
) -> CorpusListing:
    """List the files of a corpus, each once however often and by whatever names it is reached, and what is left out.

    Args:
        entries: Files, folders (searched recursively, through links as well; what is hidden is left out), patterns
            such as `texts/*.md`, file:// URLs, prefixes of Megatron token stores, or "stdlib".
        text_key: Key or column that holds the text of a record.
        null_text: Whether records without a text are refused, or skipped and counted.
        setting: The setting that has the entries, for messages.

    Raises:
        CorpusError: If an entry is missing, cannot be read, or holds nothing readable.
    """
    left_out = LeftOut()
    found: list[tuple[int, FoundFile]] = []
    for number, entry in enumerate(entries):
        found += [(number, file) for file in _find_entry_files(entry, left_out, setting)]

    unread = [file for _, file in found if not file.is_read]
    found = [(number, file) for number, file in found if file.is_read]

    # The first entry that has a file keeps it, and in it the path without links, so that the choice does not depend on
    # the order of a file system.
    first_with: dict[str, int] = {}
    for i in sorted(range(len(found)), key=lambda i: (found[i][0], found[i][1].is_linked, i)):
        first_with.setdefault(found[i][1].identity, i)
    chosen = set(first_with.values())

    files = [_to_source_file(file, text_key, null_text) for _, file in found]
    for path, size in _find_named_twice(found, first_with):
        left_out.add("files named twice", size, str(path))
    for unnamed in _drop_repeated(unread):
        if unnamed.identity not in first_with:
            left_out.add_file(unnamed.path, unnamed.size)
    return CorpusListing(
        files=tuple(file for i, file in enumerate(files) if i in chosen),
        earlier_files=tuple(
            file for file, (_, candidate) in zip(files, found, strict=True) if candidate.was_listed
        ),
        left_out=left_out,
    )


def _find_named_twice(
    found: Sequence[tuple[int, FoundFile]], first_with: Mapping[str, int]
) -> list[tuple[Path, int]]:
    """Return a further path, and the size, of each file that several entries name, or one entry by several paths.

    A pattern may find a path often: by itself, and in each folder above it that it finds as well.
    """
    twice: dict[str, tuple[Path, int]] = {}
    for number, file in found:
        first_number, first = found[first_with[file.identity]]
        if (number, file.path) != (first_number, first.path):
            twice.setdefault(file.identity, (file.path, file.size))
    return list(twice.values())


def _drop_repeated(files: Sequence[FoundFile]) -> list[FoundFile]:
    """Return each path once; the halves of a token store are two."""
    return list({file.path: file for file in files}.values())


def _to_source_file(
    found: FoundFile, text_key: str, null_text: Literal["refuse", "skip"]
) -> SourceFile:
    return SourceFile(
        found.path,
        found.name,
        found.size,
        found.modified_ns,
        text_key=text_key,
        null_text=null_text,
    )


def _find_entry_files(entry: str, left_out: LeftOut, setting: str) -> list[FoundFile]:
    """Return the files of a corpus entry, those of a folder sorted by path."""
    if entry == STANDARD_LIBRARY:
        return list_library(Path(sysconfig.get_path("stdlib")))

    paths, is_pattern = find_entry_paths(entry, setting)
    skipped = LeftOut()
    files: list[FoundFile] = []
    # What is left out of a folder that the pattern finds as well is counted there.
    folders = {path for path in paths if path.is_dir()}
    for path in paths:
        counted = LeftOut() if folders.intersection(path.parents) else skipped
        if path in folders:
            files += walk_folder(path, counted)
        elif path.suffix in TOKEN_SUFFIXES and not (is_pattern and _lacks_half(path)):
            # Either file names the pair; the .bin file stands for it, since its size is that of the tokens.
            files.append(_describe_named_file(path.with_suffix(".bin")))
        elif text_suffix(path) in TEXT_SUFFIXES:
            files.append(_describe_named_file(path))
        elif text_suffix(path) in NAMED_TEXT_SUFFIXES:
            # A pattern for everything names settings as little as the folder does.
            is_named = not is_pattern or text_suffix(Path(entry)) in NAMED_TEXT_SUFFIXES
            files.append(replace(_describe_named_file(path), is_read=is_named))
        elif is_pattern:
            counted.add_file(path, path.lstat().st_size)
        else:
            raise CorpusError(f"{entry}: unsupported corpus file: use {describe_suffixes()}")
    if not any(file.is_read for file in files):
        for file in _drop_repeated(files):
            skipped.add_file(file.path, file.size)
        kind = "this pattern" if is_pattern else "this folder"
        has = f"; it has {skipped.describe()}" if skipped else ""
        raise CorpusError(f"{entry}: {kind} has no {describe_suffixes()}{has}")
    left_out.update(skipped)
    return files


def _lacks_half(path: Path) -> bool:
    """Return whether a file is not half of a token store: other files are called .bin as well."""
    return not all(path.with_suffix(suffix).is_file() for suffix in TOKEN_SUFFIXES)


def _describe_named_file(path: Path) -> FoundFile:
    if not path.is_file():
        raise CorpusError(f"{path}: missing")
    return FoundFile.describe(path, path.parent)
