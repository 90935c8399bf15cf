"""Several token stores read as one, in shares by weight: which store each sample reads is computed, not remembered.

A store folder that holds a blend has a manifest and a tokenizer, but no tokens: those stay in the stores it names.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ul2r.data.sampling.shuffle import Int64s, index_shuffle
from ul2r.errors import CorpusError
from ul2r.objective import WindowSource
from ul2r.objective.randomness import Purpose

BLOCK = 10_000
"""Samples in which every store has its exact share."""


class Blend:
    """Windows of several stores. In every block of `BLOCK` samples each store has its share, in an order of its own.

    A store's samples are read one after the other, whatever stands between them, so that each of its windows is read
    once in each of its epochs.
    """

    def __init__(
        self, sources: Sequence[WindowSource], weights: Sequence[float], seed: int
    ) -> None:
        """Blend `sources`.

        Args:
            sources: Windows of each store.
            weights: Their shares, of any sum.
            seed: The run's seed.

        Raises:
            CorpusError: If a share is too small for a single sample in a block.
        """
        self._sources, self._seed = sources, seed
        self._counts = np.array(shares(weights))
        self._ends = np.cumsum(self._counts)

    def locate(self, samples: Int64s) -> tuple[Int64s, Int64s]:
        """The store of each sample and the sample's number in it, int64 (N,) each."""
        _, places = index_shuffle(self._seed, Purpose.BLEND, samples, BLOCK)
        source = np.searchsorted(self._ends, places, side="right")
        count = self._counts[source]
        return source, samples // BLOCK * count + places - (self._ends[source] - count)

    def read(self, samples: Int64s, lengths: Int64s, windows: npt.NDArray[np.int32]) -> None:
        """Read each sample's window from its store; see `WindowSource`."""
        read_each(self._sources, self.locate(samples), samples, lengths, windows)


def read_each(
    sources: Sequence[WindowSource],
    located: tuple[Int64s, Int64s],
    samples: Int64s,
    lengths: Int64s,
    windows: npt.NDArray[np.int32],
) -> None:
    """Read each sample's window from the source that has it; see `WindowSource`.

    Args:
        sources: Those that samples are read from.
        located: The source of each sample and the sample's number in it, int64 (N,) each.
        samples: As in `WindowSource`.
        lengths: As there.
        windows: As there.
    """
    source, own = located
    for number in np.unique(source[samples >= 0]).tolist():
        mine = (source == number) & (samples >= 0)
        wanted = lengths[mine]
        text = np.empty((len(wanted), windows.shape[1]), np.int32)
        sources[number].read(own[mine], wanted, text)
        lengths[mine], windows[mine] = wanted, text


def shares(weights: Sequence[float]) -> list[int]:
    """`BLOCK` samples shared out by weight: rounded down, then one more for those that lost most by it.

    Raises:
        CorpusError: If a share is too small for a single sample.
    """
    exact = [weight / math.fsum(weights) * BLOCK for weight in weights]
    counts = [int(share) for share in exact]
    by_loss = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_loss[: BLOCK - sum(counts)]:
        counts[i] += 1
    if 0 in counts:
        small = counts.index(0)
        raise CorpusError(
            f"data.blend.{small}.weight={weights[small]:g} of {math.fsum(weights):g} is less than one sample in "
            f"{BLOCK}: raise it, or leave the store out"
        )
    return counts


class Documents(Protocol):
    """Documents of tokens, one behind the other."""

    def __len__(self) -> int: ...

    @property
    def documents(self) -> int:
        """Number of documents."""

    @property
    def document_bounds(self) -> Int64s:
        """Number of the token that each document begins with, and of all tokens, int64 (D + 1,)."""

    def document(self, number: int) -> npt.NDArray[np.int32]:
        """Tokens of one document."""

    def tokens(self, start: int, length: int) -> npt.NDArray[np.int32]:
        """Tokens [start, start + length), going round."""


class MergedStores:
    """Stores one behind the other, read as a `TokenStore` is."""

    def __init__(self, stores: Sequence[Documents]) -> None:
        self._stores = stores
        self._ends = np.cumsum([len(store) for store in stores], dtype=np.int64).tolist()
        self._documents = np.cumsum([store.documents for store in stores], dtype=np.int64).tolist()

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def documents(self) -> int:
        """Number of documents."""
        return int(self._documents[-1])

    @property
    def document_bounds(self) -> Int64s:
        """Number of the token that each document begins with, and of all tokens, int64 (D + 1,)."""
        begins = [0, *self._ends]
        parts = [
            store.document_bounds[:-1] + begin
            for store, begin in zip(self._stores, begins, strict=False)
        ]
        return np.concatenate([*parts, [len(self)]])

    def document(self, number: int) -> npt.NDArray[np.int32]:
        """Tokens of one document, as a copy.

        Raises:
            IndexError: If there is no such document.
        """
        store = bisect.bisect_right(self._documents, number)
        if not 0 <= number < self.documents:
            raise IndexError(f"document {number} of {self.documents}")
        return self._stores[store].document(number - (self._documents[store - 1] if store else 0))

    def tokens(self, start: int, length: int) -> npt.NDArray[np.int32]:
        """Tokens [start, start + length) as a copy; after the last token comes the first again."""
        parts: list[npt.NDArray[np.int32]] = []
        while length:
            start %= len(self)
            store = bisect.bisect_right(self._ends, start)
            size = min(length, self._ends[store] - start)
            begin = start - (self._ends[store - 1] if store else 0)
            parts.append(self._stores[store].tokens(begin, size))
            start, length = start + size, length - size
        return np.concatenate(parts) if parts else np.empty(0, np.int32)
