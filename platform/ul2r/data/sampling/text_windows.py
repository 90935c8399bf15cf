"""Which text a sample reads: a sample index becomes a window of the token store by a keyed permutation, not a table.

`TextWindows` cuts all tokens into windows of equal length, whose documents end where they end. In each epoch every window
is read once, in a new order and with the cuts moved by a new random shift, so that an epoch sees other windows and
other ends left over. `DocumentWindows` cuts each document for itself.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from ul2r.config.denoisers import MINIMUM_RAW_LENGTH
from ul2r.data.sampling.shuffle import Int64s, index_shuffle
from ul2r.errors import CorpusError
from ul2r.objective.randomness import Purpose


class Tokens(Protocol):
    """A run of tokens that goes round: after the last comes the first."""

    def __len__(self) -> int: ...

    def tokens(self, start: int, length: int) -> npt.NDArray[np.int32]:
        """Tokens [start, start + length), of shape (length,)."""


class Documents(Tokens, Protocol):
    """Tokens of documents, one behind the other."""

    @property
    def document_bounds(self) -> Int64s:
        """Where each document begins, and the last one ends, int64 (D + 1,)."""


class TextWindows:
    """Windows of `length` tokens by sample index; memory and time do not grow with the store.

    Sample k is window `k % n` of epoch `k // n`, where n = tokens // length. An epoch reads n windows that do not
    overlap; the tokens % length tokens between the last cut and the first are left out of it.
    """

    def __init__(
        self,
        store: Tokens,
        length: int,
        seed: int,
        *,
        split: str | None = "train",
        source: int = 0,
        purpose: Purpose = Purpose.ORDER,
    ) -> None:
        """Cut `store` into windows of `length` tokens.

        Args:
            store: The tokens.
            length: Tokens of a window.
            seed: The run's seed.
            split: Name of the store in the error's text; without one there may be no window.
            source: Number of the store among those of a blend, or of a chapter.
            purpose: What the orders of its epochs are drawn for.

        Raises:
            CorpusError: If the store is shorter than one window.
        """
        if split is not None and len(store) < length:
            raise CorpusError(
                f"the {split} split holds {len(store)} tokens, one window needs {length}: "
                "give more text, shorten objective.sequence_length or raise objective.slots_per_row"
            )
        self.length = length
        self._store, self._seed, self._source, self._purpose = store, seed, source, purpose

    def __len__(self) -> int:
        """Windows in an epoch."""
        return len(self._store) // self.length

    def read(self, samples: Int64s, lengths: Int64s, windows: npt.NDArray[np.int32]) -> None:
        """Read the first `lengths[i]` tokens of each sample's window to `windows[i]`; nothing for sample -1."""
        assert lengths.max(initial=0) <= self.length, (lengths.max(), self.length)
        _copy(self._store, self.starts(samples), lengths, windows)

    def starts(self, samples: Int64s) -> Int64s:
        """Number of the token that each sample's window begins with, int64 (N,)."""
        shifts, places = index_shuffle(
            self._seed,
            self._purpose,
            samples,
            len(self),
            bound=len(self._store),
            source=self._source,
        )
        return (shifts + places * self.length) % len(self._store)


class DocumentWindows:
    """Windows of at most `length` tokens that lie within a document each.

    A document of n tokens is cut into ceil(n / length) windows, as equal as can be. Sample k is window `k % n` of
    epoch `k // n`, where n counts all documents' windows; every epoch reads each of them once, in a new order. Whole
    documents of less than `MINIMUM_RAW_LENGTH` tokens are left out.
    """

    def __init__(
        self,
        store: Documents,
        length: int,
        seed: int,
        *,
        split: str | None = "train",
        source: int = 0,
        purpose: Purpose = Purpose.ORDER,
    ) -> None:
        """Cut the documents of `store`; arguments are those of `TextWindows`.

        Raises:
            CorpusError: If no document is long enough.
        """
        self.length = length
        self._store, self._seed, self._source, self._purpose = store, seed, source, purpose
        self._bounds = store.document_bounds
        sizes = np.diff(self._bounds)
        self._counts = np.where(sizes < MINIMUM_RAW_LENGTH, 0, -(-sizes // length))
        self._before = np.cumsum(self._counts)  # windows of a document and of those before it
        if split is not None and not len(self):
            raise CorpusError(
                f"the {split} split has no document of {MINIMUM_RAW_LENGTH} tokens or more: give other text, or set "
                "objective.within_document to false"
            )

    def __len__(self) -> int:
        """Windows in an epoch."""
        return int(self._before[-1]) if len(self._before) else 0

    def read(self, samples: Int64s, lengths: Int64s, windows: npt.NDArray[np.int32]) -> None:
        """Read each sample's window to `windows[i]`; `lengths[i]` becomes less where it has fewer tokens."""
        _, places = index_shuffle(
            self._seed, self._purpose, samples, len(self), source=self._source
        )
        documents = np.searchsorted(self._before, places, side="right")
        counts = self._counts[documents]
        part = places - (self._before[documents] - counts)
        first, size = self._bounds[documents], np.diff(self._bounds)[documents]
        starts = first + part * size // counts
        ends = first + (part + 1) * size // counts
        np.minimum(lengths, ends - starts, out=lengths)
        _copy(self._store, starts, lengths, windows)


def _copy(store: Tokens, starts: Int64s, lengths: Int64s, windows: npt.NDArray[np.int32]) -> None:
    for window, start, length in zip(windows, starts.tolist(), lengths.tolist(), strict=True):
        window[:length] = store.tokens(start, length)
