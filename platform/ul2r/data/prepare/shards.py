"""From files to tokens, in shards that can be made anywhere and in any order.

`group_files` cuts the corpus into groups, `write_shard` tokenises one of them; `data/prepare/merge.py` makes a store of them.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from ul2r.data.prepare.documents import read_documents
from ul2r.data.prepare.source_files import ONE_DOCUMENT_SUFFIXES, SourceFile, kind
from ul2r.data.store.token_store import TokenStore, TokenWriter, suffixed
from ul2r.data.tokenizer import encode
from ul2r.errors import CorpusError
from ul2r.objective.vocabulary import Vocabulary

SHARDS = 64
"""Groups that a corpus is cut into, as far as the sizes below allow."""
SMALLEST_SHARD, LARGEST_SHARD = 2**20, 2**28
"""Bytes: a task costs Ray about 0.1 s, and a large corpus should show progress and lose little when stopped."""
DOCUMENT = np.dtype([("key", "<u8"), ("text_bytes", "<i8")])
"""What a shard keeps of each document: a digest that decides its side of the split, and its size."""


@dataclass(frozen=True)
class Group:
    """Files that make one shard."""

    number: int
    files: tuple[SourceFile, ...]
    cut_documents: bool = False
    """Whether each piece of a document stands for itself, so that a corpus of one long text can be split."""

    @property
    def size(self) -> int:
        """Bytes of the files."""
        return sum(file.size for file in self.files)


class _Part(NamedTuple):
    """A part of a document on its way into a shard."""

    tokens: npt.NDArray[np.int32]
    source: bytes
    """What the document's key is made from."""
    text_bytes: int
    ends_document: bool


def group_files(
    files: Sequence[SourceFile],
    largest: int = LARGEST_SHARD,
    key: Callable[[SourceFile], bytes] | None = None,
) -> list[Group]:
    """Cut the files into groups of about equal size.

    Args:
        files: The corpus.
        largest: Bytes of a group, at most, unless a file that cannot be cut is larger.
        key: Sorts the files and their parts; without it they keep their order.
    """
    total = sum(file.size for file in files)
    target = min(max(total // SHARDS, SMALLEST_SHARD), largest)
    parts = [part for file in files for part in file.parts(target)]
    groups: list[list[SourceFile]] = []
    room = 0
    for part in parts if key is None else sorted(parts, key=key):
        if room <= 0:
            groups.append([])
            room = target
        groups[-1].append(part)
        room -= part.size
    alone = len(files) == 1 and kind(files[0].path) in ONE_DOCUMENT_SUFFIXES
    return [Group(number, tuple(group), alone) for number, group in enumerate(groups)]


def shard_is_done(group: Group, folder: Path) -> bool:
    """Whether `write_shard` has finished this group in `folder`."""
    return _documents_file(folder, group.number).is_file()


def write_shard(group: Group, folder: Path, tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Tokenise a group's documents, each closed by an eos, into a shard in `folder`.

    Raises:
        CorpusError: If a file cannot be read, or holds tokens that are not this tokenizer's.
    """
    keys, sizes = array("Q"), array("q")
    with TokenWriter(shard_prefix(folder, group.number), vocabulary.size) as writer:
        key, size = hashlib.blake2b(digest_size=8), 0
        for part in _parts(group, tokenizer, vocabulary):
            writer.append(part.tokens)
            key.update(part.source)
            size += part.text_bytes
            if part.ends_document or group.cut_documents:
                if part.tokens[-1] != vocabulary.eos:
                    writer.append([vocabulary.eos])
                writer.end_document()
                keys.append(int.from_bytes(key.digest(), "little"))
                sizes.append(size)
                key, size = hashlib.blake2b(digest_size=8), 0
    documents = np.empty(len(keys), DOCUMENT)
    documents["key"], documents["text_bytes"] = keys, sizes
    beside = suffixed(shard_prefix(folder, group.number), ".part.npy")
    np.save(beside, documents)
    beside.replace(_documents_file(folder, group.number))


def _parts(group: Group, tokenizer: Tokenizer, vocabulary: Vocabulary) -> Iterator[_Part]:
    for file in group.files:
        if file.holds_tokens:
            yield from _token_parts(file.path, vocabulary)
        else:
            for text, ends_document in read_documents(file):
                source = text.encode()
                yield _Part(encode(tokenizer, text), source, len(source), ends_document)


def _token_parts(path: Path, vocabulary: Vocabulary) -> Iterator[_Part]:
    """Documents of an existing token store, each whole, if their tokens can be this tokenizer's text."""
    is_text = np.ones(vocabulary.size, np.bool_)
    is_text[list(vocabulary.non_text_ids)] = False
    store = TokenStore.open(path.with_suffix(""))
    for number in range(store.documents):
        tokens = store.document(number)
        if not len(tokens):
            continue
        inside = (tokens >= 0) & (tokens < vocabulary.size)
        if not inside.all() or not is_text[tokens].all():
            raise CorpusError(
                f"{path}: document {number} has tokens {tokens.min()} to {tokens.max()}; some are no text in the "
                f"tokenizer of {vocabulary.size} entries: set data.tokenizer to the one it was made with"
            )
        yield _Part(tokens, tokens.tobytes(), text_bytes=0, ends_document=True)


def shard_documents(folder: Path, number: int) -> npt.NDArray[np.void]:
    """What a finished shard keeps of its documents, `DOCUMENT` (D,)."""
    documents: npt.NDArray[np.void] = np.load(_documents_file(folder, number))
    return documents


def shard_prefix(folder: Path, number: int) -> Path:
    """Where a shard's tokens lie; one without documents has no store there."""
    return folder / f"shard_{number:05d}"


def remove_shard(folder: Path, number: int) -> None:
    """Remove a shard's files, those that are still there."""
    for suffix in (".npy", ".bin", ".idx"):  # it counts as done by the first
        suffixed(shard_prefix(folder, number), suffix).unlink(missing_ok=True)


def _documents_file(folder: Path, number: int) -> Path:
    return suffixed(shard_prefix(folder, number), ".npy")
