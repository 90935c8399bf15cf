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

    def document_bounds(self, first: int, end: int) -> npt.NDArray[np.int64]:
        """Return the tokens at which documents [first, end) begin, and where the last ends; see `DocumentSource`."""
        bounds = np.empty(end - first + 1, np.int64)
        # Written store by store: where one ends, the next begins, so that the shared entry is written twice.
        token_begin = 0
        document_begin = 0
        for store, token_end, document_end in zip(
            self._stores, self._token_ends, self._document_ends, strict=True
        ):
            first_here = max(first, document_begin)
            end_here = min(end, document_end)
            if first_here < end_here:
                of_store = store.document_bounds(
                    first_here - document_begin, end_here - document_begin
                )
                bounds[first_here - first : end_here - first + 1] = of_store + token_begin
            token_begin = token_end
            document_begin = document_end
        return bounds

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
