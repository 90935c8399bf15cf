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

UINT16_VOCABULARY = 65_500
"""Vocabularies below this size are stored as uint16, others as int32 (Megatron's `optimal_dtype`)."""
MAXIMUM_DOCUMENT = 2**31 - 1
"""Tokens; the index counts those of a sequence in 32 bits."""


class TokenStore:
    """Documents of tokens, memory-mapped; also readable as one run of tokens from end to end.

    Pickles as its path, so it costs nothing to send to another process of a shared file system.
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
            CorpusError: If either is missing, damaged, or holds something else than tokens.
        """
        index_path, data_path = suffixed(prefix, ".idx"), suffixed(prefix, ".bin")
        for path in (index_path, data_path):
            if not path.is_file():
                raise CorpusError(f"{path}: missing; a token store is a .bin and an .idx file")
        index, size = IndexFile.read(index_path), data_path.stat().st_size
        if size != index.data_bytes:
            raise CorpusError(
                f"{data_path}: {size} bytes, but {index_path.name} describes {index.data_bytes}: "
                "the pair is damaged or of two different stores"
            )
        if not size:
            raise CorpusError(f"{data_path}: holds no tokens")
        return cls(prefix, np.memmap(data_path, dtype=index.dtype, mode="r"), index)

    def __len__(self) -> int:
        return len(self._tokens)

    def __reduce__(self) -> tuple[Callable[[Path], TokenStore], tuple[Path]]:
        return TokenStore.open, (self.prefix,)

    @property
    def documents(self) -> int:
        """Number of documents."""
        return self._index.documents

    @property
    def document_bounds(self) -> npt.NDArray[np.int64]:
        """Number of the token that each document begins with, and of all tokens, int64 (D + 1,)."""
        return self._index.document_bounds()

    def document(self, number: int) -> npt.NDArray[np.int32]:
        """Tokens of one document, as a copy.

        Raises:
            IndexError: If there is no such document.
            CorpusError: If the index puts it where there are no tokens.
        """
        if not 0 <= number < self.documents:
            raise IndexError(f"document {number} of {self.documents}")
        begin, end = self._index.extent(number)
        if not 0 <= begin <= end <= len(self):
            raise CorpusError(
                f"{suffixed(self.prefix, '.idx')}: document {number} has tokens {begin} to {end} of "
                f"{len(self)}: the index is damaged; make the pair again"
            )
        return self._tokens[begin:end].astype(np.int32)

    def tokens(self, start: int, length: int) -> npt.NDArray[np.int32]:
        """Tokens [start, start + length) as a copy; after the last token comes the first again."""
        out = np.empty(length, np.int32)
        start, filled = start % len(self), 0
        while filled < length:
            part = self._tokens[start : start + length - filled]
            out[filled : filled + len(part)] = part
            start, filled = 0, filled + len(part)
        return out


class TokenWriter:
    """Streams documents into a token store; the `.idx` file, written last, makes it one.

        with TokenWriter(folder / "train", vocabulary_size=4096) as writer:
            writer.append([5, 6, 7])
            writer.end_document()

    Nothing is left if the block raises.
    """

    def __init__(self, prefix: Path, vocabulary_size: int) -> None:
        self.prefix = prefix
        self.dtype: type[np.integer[Any]] = (
            np.uint16 if vocabulary_size < UINT16_VOCABULARY else np.int32
        )
        self.tokens = 0
        self._lengths = array("i")
        self._open_length = 0

    @property
    def documents(self) -> int:
        """Number of finished documents."""
        return len(self._lengths)

    def __enter__(self) -> Self:
        self._data = suffixed(self.prefix, ".bin").open("wb")
        return self

    def append(self, tokens: npt.ArrayLike) -> None:
        """Add tokens to the document being written."""
        values = np.asarray(tokens, dtype=self.dtype)
        self._data.write(values.tobytes())
        self._open_length += values.size

    def end_document(self) -> None:
        """Finish the document being written.

        Raises:
            CorpusError: If it has more tokens than the format can count.
        """
        if self._open_length > MAXIMUM_DOCUMENT:
            raise CorpusError(
                f"a document of {self._open_length} tokens is longer than the {MAXIMUM_DOCUMENT} "
                "that a token store can hold in one: split its file"
            )
        self._lengths.append(self._open_length)
        self.tokens += self._open_length
        self._open_length = 0

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._data.close()
        if kind is not None:
            suffixed(self.prefix, ".bin").unlink()
            return
        assert not self._open_length, "the last document was not ended"
        lengths = np.array(self._lengths, np.int32)
        write_index(suffixed(self.prefix, ".idx"), lengths, self.dtype)


def suffixed(prefix: Path, suffix: str) -> Path:
    """`prefix` with `suffix` put behind it; dots in its name are left as they are."""
    return Path(f"{os.fspath(prefix)}{suffix}")
