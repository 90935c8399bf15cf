"""Shards of tokens, which can be made on any machine and in any order.

`group_files` divides the corpus into groups, `write_shard` tokenizes one of them; `data/prepare/merge.py` merges the
shards into a store.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from ul2r.data.document_tokenizer import DocumentTokenizer
from ul2r.data.prepare.documents import read_documents
from ul2r.data.prepare.left_out import LeftOut
from ul2r.data.prepare.long_documents import ChunkTokenizer
from ul2r.data.prepare.source_files import SourceFile
from ul2r.data.prepare.suffixes import ONE_DOCUMENT_SUFFIXES, text_suffix
from ul2r.data.store.token_store import TokenStore, TokenWriter, append_suffix
from ul2r.errors import CorpusError
from ul2r.filesystem import remove, staged_file, write_atomically
from ul2r.objective.vocabulary import Vocabulary

TARGET_SHARDS = 64
"""Groups that a corpus is divided into, within the size limits below."""
MIN_SHARD_BYTES = 2**20
"""A Ray task costs about 0.1 s."""
MAX_SHARD_BYTES = 2**28
"""A large corpus should show progress and lose little work when stopped."""
MAX_WHOLE_DOCUMENT_BYTES = 2**26
"""A corpus of one longer text is split into many documents: held-out text then comes from all of it."""
DOCUMENT_DTYPE = np.dtype([("key", "<u8"), ("text_bytes", "<i8")])
"""Record of a document in a shard: a digest that decides its side of the held-out split, and its size."""


@dataclass(frozen=True)
class FileGroup:
    """Files that become one shard.

    Attributes:
        number: Number of the shard.
        files: Its files, or parts of files.
        split_documents: Whether each chunk is a document of its own, so that a corpus of one long text can be split.
    """

    number: int
    files: tuple[SourceFile, ...]
    split_documents: bool = False

    @property
    def size(self) -> int:
        """Bytes of the files."""
        return sum(file.size for file in self.files)


class _TokenChunk(NamedTuple):
    """A part of a document, tokenized.

    Attributes:
        tokens: Its tokens, int32 (length,); those of a long document's end come with its next chunk.
        content: Bytes that the document's key is a digest of.
        text_bytes: UTF-8 bytes of its text.
        ends_document: Whether the document ends with it.
    """

    tokens: npt.NDArray[np.int32]
    content: bytes
    text_bytes: int
    ends_document: bool


def group_files(
    files: Sequence[SourceFile],
    max_bytes: int = MAX_SHARD_BYTES,
    sort_key: Callable[[SourceFile], bytes] | None = None,
) -> list[FileGroup]:
    """Divide the files into groups of about equal size.

    Args:
        files: The corpus.
        max_bytes: Largest group, unless an unsplittable file is larger.
        sort_key: Sorts the files and their parts; without it they keep their order.
    """
    total = sum(file.size for file in files)
    target = min(max(total // TARGET_SHARDS, MIN_SHARD_BYTES), max_bytes)
    parts = [part for file in files for part in file.split(target)]
    if sort_key is not None:
        parts.sort(key=sort_key)

    # The part that fills a group still belongs to it, so a group exceeds `target` by less than one part.
    groups: list[list[SourceFile]] = []
    room = 0
    for part in parts:
        if room <= 0:
            groups.append([])
            room = target
        groups[-1].append(part)
        room -= part.size

    is_one_document = len(files) == 1 and text_suffix(files[0].path) in ONE_DOCUMENT_SUFFIXES
    splits = is_one_document and total > MAX_WHOLE_DOCUMENT_BYTES
    return [FileGroup(number, tuple(group), splits) for number, group in enumerate(groups)]


def is_shard_done(group: FileGroup, folder: Path) -> bool:
    """Return whether `write_shard` has finished this group in `folder`."""
    return _document_table_file(folder, group.number).is_file()


def write_shard(
    group: FileGroup, folder: Path, tokenizer: Tokenizer, vocabulary: Vocabulary
) -> None:
    """Tokenize a group's documents, each ended by an eos, into a shard in `folder`.

    Raises:
        CorpusError: If a file cannot be read, or holds tokens that do not fit this tokenizer.
    """
    # Arrays and no lists: 8 bytes per document each, where a Python integer takes about 40.
    keys = array("Q")
    sizes = array("q")
    left_out = LeftOut()
    with TokenWriter(shard_prefix(folder, group.number), vocabulary.size) as writer:
        # A digest of the content alone: the held-out split does not depend on file names, order or groups.
        # 64 bits are enough: a collision of two documents does no more than put them on the same side of the split.
        key = hashlib.blake2b(digest_size=8)
        size = 0
        for chunk in _read_chunks(group, tokenizer, vocabulary, left_out):
            writer.append(chunk.tokens)
            key.update(chunk.content)
            size += chunk.text_bytes

            if chunk.ends_document or group.split_documents:
                # Token stores that Megatron's preprocessing wrote with --append-eod have it already.
                # A tokenizer that drops white space has no token for a document of nothing else.
                if not len(chunk.tokens) or chunk.tokens[-1] != vocabulary.eos:
                    writer.append([vocabulary.eos])
                writer.end_document()
                keys.append(int.from_bytes(key.digest(), "little"))
                sizes.append(size)
                key = hashlib.blake2b(digest_size=8)
                size = 0

    finish_shard(folder, group.number, keys, sizes, left_out)


def finish_shard(
    folder: Path, number: int, keys: array[int], text_bytes: array[int], left_out: LeftOut
) -> None:
    """Write what belongs to a shard besides its tokens.

    Args:
        folder: Folder of the shard.
        number: Its number.
        keys: Digest of each document that decides its side of the held-out split, "Q" (D,).
        text_bytes: UTF-8 bytes of each one's text, "q" (D,).
        left_out: What was left out of its files.
    """
    write_atomically(_left_out_file(folder, number), json.dumps(left_out.to_dict()))

    # Written last: a shard counts as done once this file exists.
    documents = np.empty(len(keys), DOCUMENT_DTYPE)
    documents["key"] = keys
    documents["text_bytes"] = text_bytes
    with (
        staged_file(_document_table_file(folder, number)) as staging,
        staging.open("wb") as file,
    ):
        np.save(file, documents)


def load_document_table(folder: Path, number: int) -> npt.NDArray[np.void]:
    """Load the records of a finished shard's documents, `DOCUMENT_DTYPE` (D,)."""
    documents: npt.NDArray[np.void] = np.load(_document_table_file(folder, number))
    return documents


def load_left_out(folder: Path, numbers: Sequence[int]) -> LeftOut:
    """Return what finished shards left out of their files; earlier versions did not count it."""
    left_out = LeftOut()
    for number in numbers:
        file = _left_out_file(folder, number)
        if file.exists():
            left_out.update(LeftOut.from_dict(json.loads(file.read_text(encoding="utf-8"))))
    return left_out


def shard_prefix(folder: Path, number: int) -> Path:
    """Return the prefix of a shard's token store; a shard without documents has no tokens."""
    return folder / f"shard_{number:05d}"


def remove_shard(folder: Path, number: int) -> None:
    """Remove those of a shard's files that exist."""
    # The document table first: without it the shard does not count as done, should this be interrupted.
    for suffix in (".npy", ".json", ".bin", ".idx"):
        remove(append_suffix(shard_prefix(folder, number), suffix))


def _document_table_file(folder: Path, number: int) -> Path:
    return append_suffix(shard_prefix(folder, number), ".npy")


def _left_out_file(folder: Path, number: int) -> Path:
    return append_suffix(shard_prefix(folder, number), ".json")


def _read_chunks(
    group: FileGroup, tokenizer: Tokenizer, vocabulary: Vocabulary, left_out: LeftOut
) -> Iterator[_TokenChunk]:
    chunk_tokenizer = ChunkTokenizer(DocumentTokenizer(tokenizer))
    for file in group.files:
        if file.holds_tokens:
            yield from _read_token_documents(file.path, vocabulary, left_out)
        else:
            for text, ends_document in read_documents(file, left_out):
                content = text.encode()
                # A chunk that is a document of its own is encoded as one.
                is_last = ends_document or group.split_documents
                tokens = chunk_tokenizer.encode(text, ends_document=is_last)
                yield _TokenChunk(tokens, content, len(content), ends_document)


def _read_token_documents(
    path: Path, vocabulary: Vocabulary, left_out: LeftOut
) -> Iterator[_TokenChunk]:
    """Yield the documents of an existing token store, each whole, after checking them against the vocabulary."""
    is_text = np.ones(vocabulary.size, np.bool_)
    is_text[list(vocabulary.non_text_ids)] = False

    store = TokenStore.open(path.with_suffix(""))
    for number in range(store.num_documents):
        tokens = store.read_document(number)
        if not len(tokens):
            left_out.add("empty documents", 0, f"{path}: document {number}")
            continue
        # Checked first: an unknown token would index beyond the end of `is_text`, a negative one its other end.
        is_known = (tokens >= 0) & (tokens < vocabulary.size)
        if not is_known.all() or not is_text[tokens].all():
            raise CorpusError(
                f"{path}: document {number} has tokens {tokens.min()} to {tokens.max()}; some are not text in the "
                f"tokenizer of {vocabulary.size} entries: set data.tokenizer to the one it was made with"
            )
        yield _TokenChunk(tokens, tokens.tobytes(), text_bytes=0, ends_document=True)
