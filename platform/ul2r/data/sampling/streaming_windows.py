"""Windows of a streamed store, in the order in which its segments are built; see `data/store/segments.py`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt

from ul2r.data.sampling.blend import read_from_sources
from ul2r.data.sampling.shuffle import Int64s
from ul2r.data.sampling.text_windows import DocumentWindows, TextWindows
from ul2r.data.store.segments import MAX_SEGMENTS, SegmentedStore
from ul2r.objective import WindowSource
from ul2r.objective.randomness import Purpose

SEGMENT_BITS = MAX_SEGMENTS.bit_length() - 1
"""Bits of the segment's number in the `source` that shuffles its windows; the store's number in a blend is above."""


class StreamingWindows:
    """Windows of a streamed store by sample index; reading a sample blocks until its segment is built."""

    def __init__(
        self,
        store: SegmentedStore,
        window_type: type[TextWindows] | type[DocumentWindows],
        length: int,
        seed: int,
        *,
        source: int = 0,
    ) -> None:
        """Cut the segments into windows.

        Args:
            store: The store.
            window_type: How segments are cut.
            length: Tokens of a window.
            seed: The run's seed.
            source: Number of the store in a blend.

        Raises:
            CorpusError: If the store is complete and has no window.
        """
        self._store = store
        self._source = source
        self._window_type: Callable[..., TextWindows | DocumentWindows] = window_type
        self._length = length
        self._seed = seed
        self._windows: list[TextWindows | DocumentWindows] = []
        self._ends = [0]
        """Samples of the first epoch before each segment; the last entry is where the second epoch begins."""
        self._is_complete = False
        self._add_windows()

    def read(self, samples: Int64s, lengths: Int64s, windows: npt.NDArray[np.int32]) -> None:
        """Read each sample's window; see `WindowSource`."""
        while not self._is_complete and samples.max(initial=0) >= self._ends[-1]:
            self._store.wait_for_more()
            self._add_windows()

        # side="right" skips segments that are too short for a window: they end where they begin. Sample -1, an empty
        # slot, gets source -1 here, which `read_from_sources` ignores.
        source = np.searchsorted(self._ends, samples, side="right") - 1
        numbers = samples - np.array(self._ends)[source]
        if self._is_complete:
            # The segments together were the first epoch: windows of the whole store continue with their second one.
            whole = len(self._windows) - 1
            numbers[source == whole] += len(self._windows[whole])
        read_from_sources(self._windows, (source, numbers), samples, lengths, windows)

    def _add_windows(self) -> None:
        """Cut segments that are new, and the whole store once it is complete."""
        stores = self._store.stores
        first_source = self._source << SEGMENT_BITS
        for number in range(len(self._windows), len(stores)):
            # split=None: a segment may be shorter than a window; only the whole store has to have one.
            windows = self._window_type(
                stores[number],
                self._length,
                self._seed,
                split=None,
                source=first_source + number,
                purpose=Purpose.SEGMENT,
            )
            self._windows.append(windows)
            self._ends.append(self._ends[-1] + len(windows))

        if self._store.is_complete:
            whole = self._window_type(self._store, self._length, self._seed, source=self._source)
            self._windows.append(whole)
            self._is_complete = True


class WholeStoreWindows:
    """Windows of a streamed store, shuffled over all of it; the first reading blocks until the store is complete."""

    def __init__(
        self,
        store: SegmentedStore,
        window_type: type[TextWindows] | type[DocumentWindows],
        length: int,
        seed: int,
        *,
        source: int = 0,
    ) -> None:
        """Cut the store into windows, now or when it is complete; the arguments are those of `StreamingWindows`.

        Raises:
            CorpusError: If the store is complete and has no window.
        """
        self._store = store
        self._cut = partial(window_type, store, length, seed, source=source)
        self._windows: WindowSource | None = self._cut() if store.is_complete else None

    def read(self, samples: Int64s, lengths: Int64s, windows: npt.NDArray[np.int32]) -> None:
        """Read each sample's window; see `WindowSource`."""
        if self._windows is None:
            while not self._store.is_complete:
                self._store.wait_for_more()
            self._windows = self._cut()
        self._windows.read(samples, lengths, windows)
