r"""The `.idx` half of Megatron-Core's indexed format: where each document's tokens stand in the `.bin` half.

The layout is that of `megatron/core/datasets/indexed_dataset.py`, little-endian:

    9 bytes   b"MMIDIDX\0\0"
    u64       version, 1
    u8        token type: 1 u8, 2 i8, 3 i16, 4 i32, 5 i64, 8 u16
    u64       sequences N
    u64       documents D + 1
    i32 * N   tokens of each sequence
    i64 * N   byte in `.bin` at which each sequence begins
    i64 * D+1 number of the sequence at which each document begins, and N

Sequences follow one another in `.bin` without gaps. The writer here makes one sequence of each document, as
Megatron's own preprocessing does.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ul2r.errors import CorpusError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
VERSION = 1
TOKEN_TYPES: dict[int, type[np.integer[Any]]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}


@dataclass(frozen=True)
class IndexFile:
    """An `.idx` file, memory-mapped."""

    dtype: type[np.integer[Any]]
    """Type of the tokens in `.bin`."""
    lengths: npt.NDArray[np.int32]
    """(N,) tokens of each sequence."""
    starts: npt.NDArray[np.int64]
    """(N,) bytes in `.bin`."""
    first: npt.NDArray[np.int64]
    """(D + 1,) the sequence at which each document begins, and N."""

    @classmethod
    def read(cls, path: Path) -> IndexFile:
        """Map the file.

        Raises:
            CorpusError: If it is not an index, was cut, or does not index tokens.
        """
        with path.open("rb") as stream:
            header = stream.read(HEADER.size)
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise CorpusError(f"{path}: not an index of Megatron's indexed format")
        _, version, code, sequences, documents = HEADER.unpack(header)
        if version != VERSION or code not in TOKEN_TYPES:
            known = ", ".join(f"{c} ({t.__name__})" for c, t in TOKEN_TYPES.items())
            raise CorpusError(
                f"{path}: version {version}, token type {code}; "
                f"readable are version {VERSION} and token types {known}"
            )
        size, needed = path.stat().st_size, HEADER.size + 12 * sequences + 8 * documents
        if size < needed or documents < 1:
            raise CorpusError(
                f"{path}: {size} bytes, but its header describes {needed}: it was cut"
            )
        raw = np.memmap(path, mode="r")
        starts_at = HEADER.size + 4 * sequences
        index = cls(
            TOKEN_TYPES[code],
            np.frombuffer(raw, "<i4", sequences, HEADER.size),
            np.frombuffer(raw, "<i8", sequences, starts_at),
            np.frombuffer(raw, "<i8", documents, starts_at + 8 * sequences),
        )
        if index.first[0] != 0 or index.first[-1] != sequences:
            raise CorpusError(f"{path}: its documents do not cover its {sequences} sequences")
        return index

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.first) - 1

    @property
    def data_bytes(self) -> int:
        """Bytes that `.bin` must have."""
        if not len(self.starts):
            return 0
        return int(self.starts[-1]) + int(self.lengths[-1]) * np.dtype(self.dtype).itemsize

    def extent(self, document: int) -> tuple[int, int]:
        """The tokens [begin, end) of a document, counted from the beginning of `.bin`."""
        begin, end = self.first[document : document + 2]
        return self._token_at(int(begin)), self._token_at(int(end))

    def document_bounds(self) -> npt.NDArray[np.int64]:
        """The token at which each document begins, and the number of all tokens, int64 (D + 1,)."""
        bytes_before = np.append(self.starts, self.data_bytes)[self.first]
        return bytes_before // np.dtype(self.dtype).itemsize

    def _token_at(self, sequence: int) -> int:
        at = self.data_bytes if sequence == len(self.starts) else int(self.starts[sequence])
        return at // np.dtype(self.dtype).itemsize


def write_index(path: Path, lengths: npt.NDArray[np.int32], dtype: type[np.integer[Any]]) -> None:
    """Write an `.idx` file, whole or not at all, for documents of `lengths` (D,) tokens of type `dtype`."""
    code = next(code for code, known in TOKEN_TYPES.items() if known is dtype)
    sizes = lengths.astype(np.int64) * np.dtype(dtype).itemsize
    beside = path.with_name(f"{path.name}.part")
    with beside.open("wb") as stream:
        stream.write(HEADER.pack(MAGIC, VERSION, code, len(lengths), len(lengths) + 1))
        stream.write(lengths.tobytes())
        stream.write((np.cumsum(sizes) - sizes).tobytes())
        stream.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())
    beside.replace(path)
