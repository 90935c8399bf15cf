"""Token stores in Megatron-Core's indexed format: `prefix.bin` holds tokens, `prefix.idx` their documents."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ul2r.data.store.index_file import IndexFile, write_index
from ul2r.errors import CorpusError
from ul2r.filesystem import remove

UINT16_VOCABULARY = 65_500
"""Vocabularies below this size are stored as uint16, others as int32 (Megatron's `optimal_dtype`)."""
MAX_DOCUMENT_TOKENS = 2**31 - 1
"""The index counts the tokens of a sequence in 32 bits."""

MAX_TOKEN = 2**31 - 1
"""Batches hold tokens in 32 bits."""


class TokenStore:
    """A memory-mapped store, read by document or as one circular sequence of tokens.

    It pickles as its path, so sending it to another process on a shared file system costs nothing.
    """

    def __init__(
        self, prefix: Path, tokens: npt.NDArray[np.integer[Any]], index: IndexFile
    ) -> None:
        self.prefix = prefix
        self._tokens = tokens
        self._index = index

    @classmethod
    def open(cls, prefix: Path) -> TokenStore:
        """Map `prefix.bin` and `prefix.idx`.

        Raises:
            CorpusError: If either is missing or damaged, or does not hold tokens.
        """
        index_path = append_suffix(prefix, ".idx")
        data_path = append_suffix(prefix, ".bin")
        for path in (index_path, data_path):
            if not path.is_file():
                raise CorpusError(
                    f"{path}: missing; a token store consists of a .bin and an .idx file"
                )

        index = IndexFile.read(index_path)
        size = data_path.stat().st_size
        if size != index.data_bytes:
            raise CorpusError(
                f"{data_path}: has {size} bytes, but {index_path.name} describes {index.data_bytes}: "
                "the pair is damaged or comes from two different stores"
            )
        # numpy cannot map an empty file, and its own error would not name the cause.
        if not size:
            raise CorpusError(f"{data_path}: contains no tokens")
        return cls(prefix, np.memmap(data_path, dtype=index.dtype, mode="r"), index)

    def __len__(self) -> int:
        return len(self._tokens)

    def __reduce__(self) -> tuple[Callable[[Path], TokenStore], tuple[Path]]:
        return TokenStore.open, (self.prefix,)

    @property
    def num_documents(self) -> int:
        """Number of documents, D."""
        return self._index.num_documents

    @property
    def sequence_lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of each sequence, int32 (N,); a document is one or more of them."""
        return self._index.sequence_lengths

    @property
    def document_indices(self) -> npt.NDArray[np.int64]:
        """Sequence at which each document begins, and N, int64 (D + 1,)."""
        return self._index.document_indices

    def document_bounds(self, first: int, end: int) -> npt.NDArray[np.int64]:
        """Return the tokens at which documents [first, end) begin, and where the last ends; see `DocumentSource`."""
        return self._index.document_bounds(first, end)

    def read_document(self, number: int) -> npt.NDArray[np.int32]:
        """Return a copy of one document's tokens.

        Raises:
            IndexError: If there is no such document.
            CorpusError: If the index places it outside the tokens.
        """
        if not 0 <= number < self.num_documents:
            raise IndexError(f"document {number} of {self.num_documents}")
        begin, end = self._index.document_range(number)
        if not 0 <= begin <= end <= len(self):
            raise CorpusError(
                f"{append_suffix(self.prefix, '.idx')}: document {number} has tokens {begin} to {end} of "
                f"{len(self)}: the index is damaged; prepare the store again"
            )
        # A copy: a view would be read-only and keep the type of the file.
        return self._to_int32(self._tokens[begin:end])

    def read_tokens(self, start: int, length: int) -> npt.NDArray[np.int32]:
        """Return a copy of tokens [start, start + length), int32 (length,); the first token follows the last."""
        out = np.empty(length, np.int32)
        position = start % len(self)
        filled = 0
        # More than two turns only if the store is shorter than `length`.
        while filled < length:
            part = self._tokens[position : position + length - filled]
            out[filled : filled + len(part)] = self._to_int32(part)
            filled += len(part)
            position = 0
        return out

    def _to_int32(self, tokens: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int32]:
        """Return a copy as int32.

        Raises:
            CorpusError: If a token is larger.
        """
        # Of the types of the format only int64 has larger numbers, which numpy would take modulo 2**32.
        if self._index.dtype is np.int64 and tokens.size:
            highest = max(-int(tokens.min()), int(tokens.max()))
            if highest > MAX_TOKEN:
                raise CorpusError(
                    f"{append_suffix(self.prefix, '.bin')}: has a token {highest}, ids up to {MAX_TOKEN} are "
                    "supported: the file is damaged, or not one of tokens"
                )
        return tokens.astype(np.int32)


class TokenWriter:
    """Streams documents into a token store; the store exists once the `.idx` file, written last, does.

        with TokenWriter(folder / "train", vocabulary_size=4096) as writer:
            writer.append([5, 6, 7])
            writer.end_document()

    If the block raises, both files are removed.
    """

    def __init__(
        self, prefix: Path, vocabulary_size: int, *, sequences_per_document: int = 1
    ) -> None:
        self.prefix = prefix
        self._sequences_per_document = sequences_per_document
        self._vocabulary_size = vocabulary_size
        self.dtype: type[np.integer[Any]] = (
            np.uint16 if vocabulary_size < UINT16_VOCABULARY else np.int32
        )
        self.num_tokens = 0
        # Of sequences. An array needs 4 bytes for each, a list 36: corpora have billions of documents.
        self._lengths = array("i")
        self._open_length = 0

    @property
    def num_documents(self) -> int:
        """Number of finished documents."""
        return len(self._lengths) // self._sequences_per_document

    def __enter__(self) -> Self:
        self._data = append_suffix(self.prefix, ".bin").open("wb")
        return self

    def append(self, tokens: npt.ArrayLike) -> None:
        """Add tokens to the current document.

        Raises:
            CorpusError: If one lies outside the vocabulary.
        """
        values = np.asarray(tokens)
        # Checked before the conversion, in which numpy takes integers modulo 2**16.
        if values.size and not 0 <= values.min() <= values.max() < self._vocabulary_size:
            raise CorpusError(
                f"{self.prefix}: tokens {values.min()} to {values.max()} are to be stored, but the vocabulary has "
                f"{self._vocabulary_size}: prepare the text again with the tokenizer that made them"
            )
        # Written at once: a document may be larger than the memory.
        self._data.write(values.astype(self.dtype).tobytes())
        self._open_length += values.size

    def end_document(self) -> None:
        """Finish the current document, or one of its sequences if documents have several.

        Raises:
            CorpusError: If it has more tokens than the format can count.
        """
        if self._open_length > MAX_DOCUMENT_TOKENS:
            raise CorpusError(
                f"a document has {self._open_length} tokens, a token store holds at most {MAX_DOCUMENT_TOKENS} "
                "in one document: split its file"
            )
        self._lengths.append(self._open_length)
        self.num_tokens += self._open_length
        self._open_length = 0

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._data.close()
        # What a killed process leaves, a .bin file without an .idx, is refused by every reader.
        if kind is not None:
            remove(append_suffix(self.prefix, ".bin"))
            return
        assert not self._open_length, "the last document was not ended"
        lengths = np.array(self._lengths, np.int32)
        index_path = append_suffix(self.prefix, ".idx")
        write_index(index_path, lengths, self.dtype, self._sequences_per_document)


def append_suffix(prefix: Path, suffix: str) -> Path:
    """Return `prefix` with `suffix` appended; unlike `Path.with_suffix`, it keeps any dots in the name."""
    return Path(f"{os.fspath(prefix)}{suffix}")
