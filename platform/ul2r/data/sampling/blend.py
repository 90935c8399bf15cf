"""Sampling from several token stores by weight: the store of each sample is computed, not remembered."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ul2r.data.sampling.shuffle import Int64s, index_shuffle
from ul2r.data.store.blend import BLOCK, allocate_samples
from ul2r.objective import WindowSource
from ul2r.objective.randomness import Purpose


class Blend:
    """Windows of several stores; in every block of `BLOCK` samples each store has its share, shuffled.

    The samples of a store are numbered consecutively, whatever lies between them, so each of its windows is read once
    in each of its epochs.
    """

    def __init__(
        self, sources: Sequence[WindowSource], weights: Sequence[float], seed: int
    ) -> None:
        """Blend `sources`.

        Args:
            sources: Windows of each store.
            weights: Their weights; they need not sum to 1.
            seed: The run's seed.

        Raises:
            CorpusError: If a weight is too small for a single sample in a block.
        """
        self._sources = sources
        self._seed = seed
        self._counts = np.array(allocate_samples(weights))
        self._ends = np.cumsum(self._counts)

    def locate(self, samples: Int64s) -> tuple[Int64s, Int64s]:
        """Return the store of each sample and the sample's number within it, int64 (N,) each."""
        # Positions below the first store's count belong to it, and so on. With counts of 7500 and 2500, the sample of
        # block 2 at position 8000 is of store 1, whose number 2 * 2500 + (8000 - 7500) = 5500 it is.
        _, positions = index_shuffle(self._seed, Purpose.BLEND, samples, BLOCK)
        source = np.searchsorted(self._ends, positions, side="right")
        count = self._counts[source]
        return source, samples // BLOCK * count + positions - (self._ends[source] - count)

    def read(self, samples: Int64s, lengths: Int64s, windows: npt.NDArray[np.int32]) -> None:
        """Read each sample's window from its store; see `WindowSource`."""
        read_from_sources(self._sources, self.locate(samples), samples, lengths, windows)


def read_from_sources(
    sources: Sequence[WindowSource],
    located: tuple[Int64s, Int64s],
    samples: Int64s,
    lengths: Int64s,
    windows: npt.NDArray[np.int32],
) -> None:
    """Read each sample's window from the source that it is located in.

    Args:
        sources: Sources of the samples.
        located: Source of each sample and the sample's number within it, int64 (N,) each.
        samples: As in `WindowSource.read`.
        lengths: As in `WindowSource.read`.
        windows: As in `WindowSource.read`.
    """
    source, numbers = located
    for index in np.unique(source[samples >= 0]).tolist():
        is_from_source = (source == index) & (samples >= 0)

        # Boolean indexing copies, so results are written back: a source may have shortened the lengths.
        source_lengths = lengths[is_from_source]
        text = np.empty((len(source_lengths), windows.shape[1]), np.int32)
        sources[index].read(numbers[is_from_source], source_lengths, text)
        lengths[is_from_source] = source_lengths
        windows[is_from_source] = text
