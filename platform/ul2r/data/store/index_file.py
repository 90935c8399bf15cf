r"""The `.idx` half of Megatron-Core's indexed format: the position of each document in the `.bin` half.

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
Megatron's own preprocessing does, and two of a pair: prompt and answer.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ul2r.errors import CorpusError
from ul2r.filesystem import staged_file

MAGIC = b"MMIDIDX\x00\x00"
# "<" means without padding: the integers after the 9-byte magic are unaligned, as Megatron writes them.
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
"""Integer types by their code in the header. Codes 6 and 7 are Megatron's float64 and float32, which hold no tokens."""


@dataclass(frozen=True)
class IndexFile:
    """A memory-mapped `.idx` file.

    Attributes:
        dtype: Type of the tokens in `.bin`.
        sequence_lengths: Tokens of each sequence, int32 (N,).
        sequence_pointers: Byte of `.bin` at which each sequence begins, int64 (N,).
        document_indices: Sequence at which each document begins, and N, int64 (D + 1,).
    """

    dtype: type[np.integer[Any]]
    sequence_lengths: npt.NDArray[np.int32]
    sequence_pointers: npt.NDArray[np.int64]
    document_indices: npt.NDArray[np.int64]

    @classmethod
    def read(cls, path: Path) -> IndexFile:
        """Map the file.

        Raises:
            CorpusError: If it is not an index, is truncated, or does not index tokens.
        """
        with path.open("rb") as file:
            header = file.read(HEADER.size)
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise CorpusError(f"{path}: not an index of Megatron's indexed format")

        # Megatron stores D + 1 in the header: it counts the entries of `document_indices`, not the documents.
        _, version, code, num_sequences, num_indices = HEADER.unpack(header)
        if version != VERSION or code not in TOKEN_TYPES:
            known = ", ".join(f"{c} ({t.__name__})" for c, t in TOKEN_TYPES.items())
            raise CorpusError(
                f"{path}: version {version} with token type {code} is not supported; "
                f"supported are version {VERSION} with token types {known}"
            )

        size = path.stat().st_size
        needed = HEADER.size + 12 * num_sequences + 8 * num_indices
        if size < needed or num_indices < 1:
            raise CorpusError(
                f"{path}: has {size} bytes, but its header describes {needed}: the file is truncated"
            )

        # The header's 34 bytes leave the int64 arrays unaligned; numpy reads them all the same.
        raw = np.memmap(path, mode="r")
        pointers_at = HEADER.size + 4 * num_sequences
        index = cls(
            TOKEN_TYPES[code],
            np.frombuffer(raw, "<i4", num_sequences, HEADER.size),
            np.frombuffer(raw, "<i8", num_sequences, pointers_at),
            np.frombuffer(raw, "<i8", num_indices, pointers_at + 8 * num_sequences),
        )
        if index.document_indices[0] != 0 or index.document_indices[-1] != num_sequences:
            raise CorpusError(f"{path}: its documents do not cover its {num_sequences} sequences")
        return index

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.document_indices) - 1

    @property
    def data_bytes(self) -> int:
        """Required size of `.bin` in bytes."""
        if not len(self.sequence_pointers):
            return 0
        last_bytes = int(self.sequence_lengths[-1]) * np.dtype(self.dtype).itemsize
        return int(self.sequence_pointers[-1]) + last_bytes

    def document_bounds(self, first: int, end: int) -> npt.NDArray[np.int64]:
        """Return the tokens at which documents [first, end) begin, and where the last ends, int64 (N + 1,)."""
        # Megatron's own stores may have several sequences per document, so documents are found through both tables.
        sequences = self.document_indices[first : end + 1]
        num_sequences = len(self.sequence_pointers)
        begins = self.sequence_pointers[np.minimum(sequences, num_sequences - 1)]
        byte_bounds = np.where(sequences == num_sequences, self.data_bytes, begins)
        bounds: npt.NDArray[np.int64] = byte_bounds // np.dtype(self.dtype).itemsize
        return bounds

    def document_range(self, number: int) -> tuple[int, int]:
        """Return the tokens [begin, end) of one document, counted from the beginning of `.bin`."""
        # Two entries of the mapped file, without the arrays of `document_bounds`: a merge asks for each document.
        begin, end = self.document_indices[number : number + 2]
        return self._token_offset(int(begin)), self._token_offset(int(end))

    def _token_offset(self, sequence: int) -> int:
        # A damaged table can hold any number; no token has this offset, so `TokenStore.read_document` refuses it.
        if not 0 <= sequence <= len(self.sequence_pointers):
            return -1
        is_end = sequence == len(self.sequence_pointers)
        offset = self.data_bytes if is_end else int(self.sequence_pointers[sequence])
        return offset // np.dtype(self.dtype).itemsize


def write_index(
    path: Path,
    lengths: npt.NDArray[np.int32],
    dtype: type[np.integer[Any]],
    sequences_per_document: int = 1,
) -> None:
    """Write an `.idx` file atomically.

    Args:
        path: The file.
        lengths: Tokens of each sequence, int32 (N,).
        dtype: Type of the tokens in `.bin`.
        sequences_per_document: Sequences of each document; a divisor of N.
    """
    num_sequences = len(lengths)
    assert num_sequences % sequences_per_document == 0, (num_sequences, sequences_per_document)
    document_indices = np.arange(0, num_sequences + 1, sequences_per_document, dtype=np.int64)
    code = next(code for code, known in TOKEN_TYPES.items() if known is dtype)
    # int64 before the product: a document of 2**30 tokens has more bytes than an int32 can count.
    sizes = lengths.astype(np.int64) * np.dtype(dtype).itemsize

    with staged_file(path) as staging, staging.open("wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, code, num_sequences, len(document_indices)))
        file.write(lengths.tobytes())
        file.write((np.cumsum(sizes) - sizes).tobytes())
        file.write(document_indices.tobytes())
