"""Windows of text by sample index: a keyed permutation maps samples to windows of a token store, without a table.

`TextWindows` cuts the whole token sequence into windows of equal length, across documents. In each epoch every window
is read once, in a new order and with all cuts moved by a new random shift, so epochs differ in their windows and in the
tokens left over. `DocumentWindows` cuts each document separately.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ul2r.config.denoisers import MINIMUM_RAW_LENGTH
from ul2r.data.sampling.shuffle import Int64s, index_shuffle
from ul2r.data.store.token_source import DocumentSource, TokenSource
from ul2r.errors import CorpusError
from ul2r.objective.randomness import Purpose

DOCUMENTS_PER_BLOCK = 2**8
"""Documents of which only the sum of their windows is kept: 8 bytes for each block."""
DOCUMENTS_PER_READ = 2**16
"""Documents whose sizes are read at a time while windows are counted; a multiple of `DOCUMENTS_PER_BLOCK`."""


class TextWindows:
    """Windows of `length` tokens by sample index; memory and time do not grow with the store.

    Sample k is window `k % n` of epoch `k // n`, where n = tokens // length. An epoch reads n windows that do not
    overlap; the tokens % length tokens between the last cut and the first are left out of it.
    """

    def __init__(
        self,
        store: TokenSource,
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
            split: Name of the split in error messages; None allows a store without windows.
            source: Number of the store in a blend, or of a segment; sources are shuffled independently.
            purpose: Stream of random numbers that shuffles the epochs.

        Raises:
            CorpusError: If the store is shorter than one window.
        """
        if split is not None:
            self.check_store(store, length, split)
        self.length = length
        self._store = store
        self._seed = seed
        self._source = source
        self._purpose = purpose

    @staticmethod
    def check_store(store: TokenSource, length: int, split: str) -> None:
        """Refuse a store without a window.

        Raises:
            CorpusError: If the store is shorter than one window.
        """
        if len(store) < length:
            raise CorpusError(
                f"the {split} split has {len(store)} tokens, one window needs {length}: "
                "add text, lower objective.sequence_length or raise objective.slots_per_row"
            )

    def __len__(self) -> int:
        """Windows in an epoch."""
        return len(self._store) // self.length

    def read(self, samples: Int64s, lengths: Int64s, windows: npt.NDArray[np.int32]) -> None:
        """Read the first `lengths[i]` tokens of each sample's window into `windows[i]`; nothing for sample -1."""
        assert lengths.max(initial=0) <= self.length, (lengths.max(), self.length)
        _copy_tokens(self._store, self.starts(samples), lengths, windows)

    def starts(self, samples: Int64s) -> Int64s:
        """Return the token at which each sample's window begins, int64 (N,)."""
        shifts, positions = index_shuffle(
            self._seed,
            self._purpose,
            samples,
            len(self),
            shift_bound=len(self._store),
            source=self._source,
        )
        # Windows may wrap around the end, so that a shifted cut loses no more tokens than an unshifted one.
        return (shifts + positions * self.length) % len(self._store)


class DocumentWindows:
    """Windows of at most `length` tokens, each within one document.

    A document of n tokens is cut into ceil(n / length) windows of nearly equal length. Sample k is window `k % n` of
    epoch `k // n`, where n counts the windows of all documents; every epoch reads each of them once, in a new order.
    Documents shorter than `MINIMUM_RAW_LENGTH` tokens are left out.

    Windows are counted once, and remembered for each block of documents: a window is found by a binary search among the
    blocks, then among the documents of its block, whose bounds are read from the index.
    """

    def __init__(
        self,
        store: DocumentSource,
        length: int,
        seed: int,
        *,
        split: str | None = "train",
        source: int = 0,
        purpose: Purpose = Purpose.ORDER,
    ) -> None:
        """Cut the documents of `store`; the arguments are those of `TextWindows`.

        Raises:
            CorpusError: If no document is long enough.
        """
        self.length = length
        self._store = store
        self._seed = seed
        self._source = source
        self._purpose = purpose

        if split is not None:
            self.check_store(store, length, split)
        self._block_ends = self._count_windows()

    @staticmethod
    def check_store(store: DocumentSource, length: int, split: str) -> None:  # noqa: ARG004  as in `TextWindows`
        """Refuse a store without a window.

        Raises:
            CorpusError: If no document is long enough.
        """
        if not any((sizes >= MINIMUM_RAW_LENGTH).any() for sizes in _iter_document_sizes(store)):
            raise CorpusError(
                f"the {split} split has no document of {MINIMUM_RAW_LENGTH} tokens or more: use other text, or set "
                "objective.within_document to false"
            )

    def __len__(self) -> int:
        """Windows in an epoch."""
        return int(self._block_ends[-1]) if len(self._block_ends) else 0

    def read(self, samples: Int64s, lengths: Int64s, windows: npt.NDArray[np.int32]) -> None:
        """Read each sample's window into `windows[i]`; reduce `lengths[i]` where the window has fewer tokens."""
        _, positions = index_shuffle(
            self._seed, self._purpose, samples, len(self), source=self._source
        )
        starts = np.empty(len(samples), np.int64)
        # side="right" skips blocks without windows: they end where the block before them ends.
        blocks = np.searchsorted(self._block_ends, positions, side="right")
        for block in np.unique(blocks).tolist():
            is_in_block = blocks == block
            begins, sizes = self._locate(block, positions[is_in_block])
            starts[is_in_block] = begins
            lengths[is_in_block] = np.minimum(lengths[is_in_block], sizes)
        _copy_tokens(self._store, starts, lengths, windows)

    def _count_windows(self) -> Int64s:
        """Return the windows up to the end of each block of documents, int64 (ceil(D / DOCUMENTS_PER_BLOCK),)."""
        counts = [
            np.add.reduceat(self._num_windows(sizes), np.arange(0, len(sizes), DOCUMENTS_PER_BLOCK))
            for sizes in _iter_document_sizes(self._store)
        ]
        return np.cumsum(np.concatenate([*counts, np.empty(0, np.int64)]))

    def _num_windows(self, sizes: Int64s) -> Int64s:
        return np.where(sizes < MINIMUM_RAW_LENGTH, 0, -(-sizes // self.length))

    def _locate(self, block: int, positions: Int64s) -> tuple[Int64s, Int64s]:
        """Return the first token and the length of windows of one block of documents.

        Args:
            block: Number of the block.
            positions: Positions of the windows in the store, int64 (N,).
        """
        first = block * DOCUMENTS_PER_BLOCK
        end = min(first + DOCUMENTS_PER_BLOCK, self._store.num_documents)
        bounds = self._store.document_bounds(first, end)
        counts = self._num_windows(np.diff(bounds))
        first_window = int(self._block_ends[block - 1]) if block else 0
        window_ends: Int64s = np.cumsum(counts) + first_window

        # As for blocks: documents without windows are skipped.
        documents = np.searchsorted(window_ends, positions, side="right")
        count = counts[documents]
        part: Int64s = positions - (window_ends[documents] - count)
        # Nearly equal parts without a remainder: 10 tokens in 3 windows are cut at 0, 3, 6 and 10.
        begins = bounds[documents]
        sizes = bounds[documents + 1] - begins
        # Not the operator, which numpy's hints take for a division of floats here.
        starts = begins + np.floor_divide(part * sizes, count)
        ends = begins + np.floor_divide((part + 1) * sizes, count)
        return starts, ends - starts


def _iter_document_sizes(store: DocumentSource) -> Iterator[Int64s]:
    """Yield the tokens of all documents, some at a time, so that memory does not grow with their number."""
    for first in range(0, store.num_documents, DOCUMENTS_PER_READ):
        end = min(first + DOCUMENTS_PER_READ, store.num_documents)
        yield np.diff(store.document_bounds(first, end))


def _copy_tokens(
    store: TokenSource, starts: Int64s, lengths: Int64s, windows: npt.NDArray[np.int32]
) -> None:
    for window, start, length in zip(windows, starts.tolist(), lengths.tolist(), strict=True):
        # An empty slot (sample -1) has length 0, so nothing is read for it, whatever its start is.
        window[:length] = store.read_tokens(start, length)
