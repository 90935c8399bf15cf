"""Interfaces of everything that tokens are read from: one store, several merged ones, a test's fake."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt


class TokenSource(Protocol):
    """A circular sequence of tokens: the first token follows the last."""

    def __len__(self) -> int: ...

    def read_tokens(self, start: int, length: int) -> npt.NDArray[np.int32]:
        """Return tokens [start, start + length), int32 (length,)."""


class DocumentSource(TokenSource, Protocol):
    """A token source that knows where its documents begin."""

    @property
    def num_documents(self) -> int:
        """Number of documents, D."""

    def document_bounds(self, first: int, end: int) -> npt.NDArray[np.int64]:
        """Return the tokens at which documents [first, end) begin, and where the last ends, int64 (end - first + 1,).

        It costs time and memory for these documents only.
        """

    def read_document(self, number: int) -> npt.NDArray[np.int32]:
        """Return the tokens of one document."""
