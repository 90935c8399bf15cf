"""Streams of random words: word i is a function of (seed, purpose, index) alone, without state.

Philox is a keyed bijection of a counter (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), so no draw
depends on another and any process can build any sample. `ul2r.objective.random_kernels` computes the words.
"""

from __future__ import annotations

from enum import IntEnum


class Purpose(IntEnum):
    """Purpose of a stream of random words; streams of different purposes are independent.

    The numbers are part of what a seed means: changing one changes every run.
    """

    DENOISER = 1
    """The denoiser of sample `index`."""
    SPANS = 2
    """The spans, or the split, of sample `index`."""
    ORDER = 3
    """The order and shift of the windows in epoch `index`."""
    ROW = 4
    """Decides if one example has row `index` to itself."""
    BLEND = 5
    """The order of the stores in block `index` of a blend."""
    SEGMENT = 6
    """The order and shift of the windows in a segment of a streamed store; `index` holds its number and the store's."""
    PAIRS = 7
    """The order of the slots of pairs in epoch `index`."""
