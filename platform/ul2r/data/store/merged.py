"""Several token stores read as one."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ul2r.data.store.token_source import DocumentSource


class MergedStores:
    """A `DocumentSource` that concatenates others."""

    def __init__(self, stores: Sequence[DocumentSource]) -> None:
        sizes = [len(store) for store in stores]
        counts = [store.num_documents for store in stores]
        self._stores = stores
        # Python integers: `bisect` compares one at a time, which is slow on numpy's.
        self._token_ends = np.cumsum(sizes, dtype=np.int64).tolist()
        self._document_ends = np.cumsum(counts, dtype=np.int64).tolist()

    def __len__(self) -> int:
        return int(self._token_ends[-1])

    @property
    def num_documents(self) -> int:
        """Number of documents, D."""
        return int(self._document_ends[-1])

    @property
    def document_bounds(self) -> npt.NDArray[np.int64]:
        """Token at which each document begins, and the total number of tokens, int64 (D + 1,)."""
        begins = [0, *self._token_ends]
        parts = [
            store.document_bounds[:-1] + begin
            # Not strict: `begins` has one more entry, the end of the last store.
            for store, begin in zip(self._stores, begins, strict=False)
        ]
        return np.concatenate([*parts, [len(self)]])

    def read_document(self, number: int) -> npt.NDArray[np.int32]:
        """Return a copy of one document's tokens.

        Raises:
            IndexError: If there is no such document.
        """
        if not 0 <= number < self.num_documents:
            raise IndexError(f"document {number} of {self.num_documents}")
        # To the right of equal ends: a store without documents is passed over.
        store = bisect.bisect_right(self._document_ends, number)
        first = self._document_ends[store - 1] if store else 0
        return self._stores[store].read_document(number - first)

    def read_tokens(self, start: int, length: int) -> npt.NDArray[np.int32]:
        """Return a copy of tokens [start, start + length), int32 (length,); the first token follows the last."""
        parts: list[npt.NDArray[np.int32]] = []
        while length:
            start %= len(self)
            store = bisect.bisect_right(self._token_ends, start)
            begin = self._token_ends[store - 1] if store else 0
            size = min(length, self._token_ends[store] - start)

            # Never past the store's end: a single store would continue with its own first token.
            parts.append(self._stores[store].read_tokens(start - begin, size))
            start += size
            length -= size
        return np.concatenate(parts) if parts else np.empty(0, np.int32)
